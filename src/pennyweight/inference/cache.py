"""Packed weights of an artefact in one file, made once and mapped afterwards.

    header    64 bytes: magic, position and length of the index, its CRC-32
    tensors   each from a multiple of 64 bytes on: packed weights as `kernels.layout` says, or numbers as they are
    index     JSON: the key, name -> [position, bytes, type, shape] (type None where packed), and notes of the maker

The key stands for what was packed: sizes, times and headers of the weight files, config.json, versions. Whether the
index is whole is checked, and each packed weight's header; the numbers themselves are not read for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from pennyweight import __version__
from pennyweight.core.errors import CheckpointError
from pennyweight.core.files import replacing
from pennyweight.inference.mapped import MappedFile
from pennyweight.kernels.packed import PackedMatrix

# The directory beside a model's files.
DIRECTORY = ".pennyweight-packed"
_MAGIC = b"PWCACHE1"
_HEADER = struct.Struct("<8sQQI36x")
_ALIGNMENT = 64

Weight = PackedMatrix | Tensor
# What the maker of a file wants to be told when it is opened again; goes through JSON.
Notes = dict[str, Any]


@dataclass(frozen=True)
class PackedFile:
    """An opened file: weights by name, in memory as far as they are touched."""

    path: Path
    size_bytes: int
    weights: Mapping[str, Weight]
    notes: Notes


def cache_key(directory: Path, files: Sequence[Path]) -> str:
    """Changes when the weight files or config.json of the artefact do, or the versions that the packing depends on."""
    import transformers

    digest = hashlib.sha256(f"{__version__} {transformers.__version__} {torch.__version__}".encode())
    digest.update((directory / "config.json").read_bytes())
    for file in sorted(files):
        state = file.stat()
        digest.update(f"\n{file.name} {state.st_size} {state.st_mtime_ns} ".encode())
        with file.open("rb") as stream:
            length = stream.read(8)
            digest.update(stream.read(int.from_bytes(length, "little")))
    return digest.hexdigest()[:32]


def places(directory: Path, key: str) -> list[Path]:
    """Where the file may be: beside the artefact, or where that can't be written, with the user's other caches."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [directory / DIRECTORY / "weights.packed", user / "pennyweight" / f"weights-{key}.packed"]


def write_packed(path: Path, key: str, weights: Iterable[tuple[str, Weight]], notes: Notes) -> None:
    """Write `path` whole or not at all, one weight in memory at a time; `notes` are read when all weights are written.

    Raises OSError where there is no room, or the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that pack at the same time write two files; the later one stays.
    own = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with replacing(own) as stream:
            _write(stream, key, weights, notes)
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


def _write(stream: BinaryIO, key: str, weights: Iterable[tuple[str, Weight]], notes: Notes) -> None:
    entries: dict[str, tuple[int, int, str | None, list[int]]] = {}
    stream.write(bytes(_HEADER.size))
    for name, weight in weights:
        stream.write(bytes(-stream.tell() % _ALIGNMENT))
        raw = weight.storage if isinstance(weight, PackedMatrix) else weight.contiguous().view(-1).view(torch.uint8)
        kind = None if isinstance(weight, PackedMatrix) else str(weight.dtype).removeprefix("torch.")
        entries[name] = (stream.tell(), raw.numel(), kind, list(weight.shape))
        stream.write(memoryview(cast(Any, raw.numpy())))
    index = json.dumps({"key": key, "entries": entries, "notes": notes}).encode()
    at = stream.tell()
    stream.write(index)
    stream.seek(0)
    stream.write(_HEADER.pack(_MAGIC, at, len(index), zlib.crc32(index)))


def open_packed(path: Path, key: str) -> PackedFile | None:
    """The file of `key`; None where there is none, or it is of another key, damaged or not to be read."""
    if not path.is_file():
        return None
    try:
        file = MappedFile(path)
        index = _index(file)
        if index["key"] != key:
            return None
        weights = {name: _weight(file, name, *entry) for name, entry in index["entries"].items()}
        return PackedFile(path, len(file), weights, index["notes"])
    except (CheckpointError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        # Whatever is wrong with it, it is made again.
        return None


def _index(file: MappedFile) -> dict[str, Any]:
    magic, at, length, checksum = _HEADER.unpack(_raw(file, 0, _HEADER.size))
    raw = _raw(file, at, length)
    if magic != _MAGIC or zlib.crc32(raw) != checksum:
        raise CheckpointError(f"{file.path}: damaged")
    return cast(dict[str, Any], json.loads(raw))


def _raw(file: MappedFile, begin: int, length: int) -> bytes:
    tensor = file.tensor(begin=begin, dtype=torch.uint8, shape=(length,))
    return cast(Any, tensor.numpy()).tobytes()  # type: ignore[no-any-return]


def _weight(file: MappedFile, name: str, begin: int, length: int, kind: str | None, shape: list[int]) -> Weight:
    if kind is not None:
        return file.tensor(begin=begin, dtype=getattr(torch, kind), shape=tuple(shape))
    return PackedMatrix.open(file.tensor(begin=begin, dtype=torch.uint8, shape=(length,)), name)
