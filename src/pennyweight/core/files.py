"""Files that appear whole or not at all, and JSON that is the same every time."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pennyweight.core.errors import SpaceError


def to_json(value: Any) -> str:
    """`value` (dataclasses, mappings, sequences, numbers, text) as indented JSON with a final newline."""
    return json.dumps(value, indent=2, default=_plain, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    with replacing(path) as stream:
        stream.write(text.encode("utf-8"))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends, and is gone if it raises."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            yield stream
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync_files(directory: Path) -> None:
    """Make the content of every file below `directory`, and their names, survive a power cut."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(directory)


def sync_directory(path: Path) -> None:
    """Make renames and new names inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leave_cache(descriptor: int, begin: int, end: int) -> None:
    """The bytes [begin, end) of a file will not be read soon: the system starts to write what is not on the disk yet,
    and frees the rest. This is advice: where none is taken all goes on, only slower."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


def allocated_bytes(directory: Path) -> int:
    """What the files in `directory` already take of the disk: less than their length where they have holes."""
    return sum(file.stat().st_blocks * 512 for file in directory.iterdir()) if directory.is_dir() else 0


def check_space(directory: Path, needed_bytes: int) -> None:
    """Raises SpaceError when the file system of `directory` has less than `needed_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise SpaceError(
            errno.ENOSPC,
            f"{directory}: the output needs {needed_bytes:,} bytes and {free:,} are free: make room, or change --out",
        )
