"""The front of a file, read no further than asked, every length checked against the file before a byte is read."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from pennyweight.core.errors import CheckpointError

# Far above the metadata of any real model: 260,000 tokens with their merges take 15 MB.
MAX_HEAD_BYTES = 1 << 28
AGAIN = "The file is damaged or was not fully downloaded: fetch it again"
_CHUNK_BYTES = 1 << 16
_LENGTH = struct.Struct("<Q")


def shown(name: str) -> str:
    """`name` in quotes, cut where it is long."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


class Head:
    """A file of `size` bytes from its first byte on; `position` is that of the next byte to be taken."""

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self.file, self.size, self.position = file, size, 0
        self._stream, self._held = stream, bytearray()

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes; raises CheckpointError where the file has fewer."""
        begin = self.position
        self._reach(begin + count, what)
        self.position = begin + count
        return self._copied(begin, self.position)

    def numbers(self, form: str, what: str) -> tuple[int, ...]:
        """Little-endian integers, `form` as in struct."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def text(self, what: str) -> bytes:
        """A string: 8 bytes length, then its bytes."""
        (length,) = self.numbers("Q", what)
        return self.take(length, what)

    def texts(self, count: int, what: str) -> bytes:
        """`count` strings with their lengths, as they stand in the file."""
        begin = end = self.position
        self.expect(8 * count, what)
        for _ in range(count):
            if end + 8 > len(self._held):
                self._reach(end + 8, what)
            end += 8 + _LENGTH.unpack_from(self._held, end)[0]
        self._reach(end, what)
        self.position = end
        return self._copied(begin, end)

    def expect(self, count: int, what: str) -> None:
        """Raises CheckpointError unless `count` more bytes are in the file."""
        self._check(self.position + count, what)

    def _copied(self, begin: int, end: int) -> bytes:
        # A slice of the array itself would be a second copy.
        with memoryview(self._held) as held:
            return bytes(held[begin:end])

    def _check(self, end: int, what: str) -> None:
        if end > self.size:
            raise CheckpointError(
                f"{self.file}: {what} would end at byte {end}, but the file has {self.size}: it is truncated. {AGAIN}."
            )
        if end > MAX_HEAD_BYTES:
            raise CheckpointError(
                f"{self.file}: {what} would end at byte {end}, at most {MAX_HEAD_BYTES} bytes of metadata are read. "
                "It is damaged or not meant to be read: fetch or convert it again."
            )

    def _reach(self, end: int, what: str) -> None:
        """Read the file up to `end` at least; doubling what is held keeps the work in proportion to it."""
        self._check(end, what)
        while (held := len(self._held)) < end:
            wanted = max(end - held, min(max(held, _CHUNK_BYTES), self.size - held))
            got = self._stream.read(wanted)
            if not got:
                raise CheckpointError(f"{self.file}: became shorter while it was read. Leave it alone and start again.")
            self._held += got
