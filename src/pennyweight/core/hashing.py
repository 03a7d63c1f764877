"""SHA-256 of files, made in the background."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from pennyweight.core.files import leave_cache

# Large enough that a thread which imports modules, and so holds the interpreter, is seldom asked to let go of it.
_READ = 1 << 24


def sha256(path: Path, *, is_wanted: Callable[[], bool] = lambda: True) -> str:
    """Hex SHA-256 of a file's content; of a part of it once it is no longer wanted."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_READ, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while is_wanted() and (count := file.readinto(buffer)):
            digest.update(buffer[:count])
    return digest.hexdigest()


class Hashes:
    """SHA-256 of files by one thread, in the order in which they were first asked for; each is read once."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._made: dict[Path, Future[str]] = {}
        self._is_open = True
        self.begin(paths)

    def begin(self, paths: Iterable[Path]) -> None:
        """Hash these too; does not wait."""
        for path in paths:
            if path not in self._made:
                self._made[path] = self._thread.submit(sha256, path, is_wanted=lambda: self._is_open)

    def of(self, path: Path) -> str:
        """The hash of a file, once it is there."""
        self.begin([path])
        return self._made[path].result()

    def close(self) -> None:
        """What is not finished is given up; nothing may be asked any more."""
        self._is_open = False
        self._thread.shutdown(wait=False, cancel_futures=True)


class GrowingHash:
    """SHA-256 of a file that is being written in pieces, in any order: its finished beginning is hashed meanwhile.

    What was hashed and is safe on the disk leaves the page cache, so that writing a large file does not push out the
    model that it is made from. A write into what was hashed already costs a second reading at the end, no more.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._thread = ThreadPoolExecutor(1)
        self._lock = Lock()
        # Pieces that were written beyond the finished beginning [0, _begun), as (first, last + 1).
        self._pieces: list[tuple[int, int]] = []
        self._begun = 0
        self._is_stale = False
        self._is_open = True
        self._digest = hashlib.sha256()
        self._hashed: list[Future[None]] = []

    def written(self, begin: int, end: int) -> None:
        """The bytes [begin, end) are about to change."""
        with self._lock:
            if begin < self._begun:
                self._is_stale = True
            heapq.heappush(self._pieces, (begin, end))

    def advance(self) -> None:
        """Hash on in the background, up to the first byte that was not written yet; everything is on the disk."""
        with self._lock:
            begin = end = self._begun
            while self._pieces and self._pieces[0][0] <= end:
                end = max(end, heapq.heappop(self._pieces)[1])
            self._begun = end
        if begin < end and not self._is_stale:
            self._hashed.append(self._thread.submit(self._hash, begin, end))

    def _hash(self, begin: int, end: int) -> None:
        buffer = memoryview(bytearray(min(_READ, end - begin)))
        position = begin
        while position < end and self._is_open:
            count = os.preadv(self._descriptor, [buffer[: end - position]], position)
            if count == 0:
                raise OSError(f"{self._path}: ends after {position} of the {end} bytes that were written to it")
            self._digest.update(buffer[:count])
            position += count
        leave_cache(self._descriptor, begin, end)

    def hexdigest(self) -> str:
        """The hash of the whole file, after `advance` and with no write since."""
        if self._is_stale or self._begun < os.fstat(self._descriptor).st_size:
            return sha256(self._path)
        for piece in self._hashed:
            piece.result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Returns when the file is no longer read."""
        self._is_open = False
        self._thread.shutdown(wait=True, cancel_futures=True)
