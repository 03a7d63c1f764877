"""SHA-256 of files, made in the background."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

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
