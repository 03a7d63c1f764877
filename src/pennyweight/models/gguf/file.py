"""A GGUF file, or the parts that one was split into, as one set of fields and tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError, ShapeError
from pennyweight.models.gguf.fields import FieldValue
from pennyweight.models.gguf.head import shown
from pennyweight.models.gguf.header import Extent, Header, read_header

SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
# One read of a large tensor is cut here: Linux moves at most 2 GiB at a time.
_READ_BYTES = 1 << 30


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: shape in torch's order (the last axis is the innermost), ggml's number of its type,
    and the `size_bytes` bytes of `file` that begin at byte `position`. Rows are those along the last axis, all others
    counted as one."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    file: Path
    position: int
    size_bytes: int

    @property
    def width(self) -> int:
        """Weights of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // max(1, self.width)

    def read_rows(self, rows: slice) -> Tensor:
        """The bytes of `rows`, uint8 [rows, bytes of a row]; see `read`."""
        each = self.size_bytes // max(1, self.rows)
        return self.read(rows.start * each, rows.stop * each).reshape(rows.stop - rows.start, each)

    def read(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Its bytes from `begin` to before `end` (all by default), uint8 [bytes], in fresh memory.

        Raises ShapeError for a range outside the tensor, CheckpointError where the file has become shorter.
        """
        end = self.size_bytes if end is None else end
        if not 0 <= begin <= end <= self.size_bytes:
            raise ShapeError(f"{self.name}: bytes {begin} to {end} asked for, the tensor has {self.size_bytes}")
        raw = torch.empty(end - begin, dtype=torch.uint8)
        # numpy shares torch's memory: the file goes straight into the tensor.
        buffer, done = memoryview(cast(Any, raw.numpy())), 0
        try:
            with open(self.file, "rb", buffering=0) as stream:
                stream.seek(self.position + begin)
                while done < len(buffer) and (moved := stream.readinto(buffer[done : done + _READ_BYTES])):
                    done += moved
        except OSError as error:
            raise CheckpointError(f"{self.file}: {self.name} cannot be read: {error.strerror or error}") from error
        if done < len(buffer):
            raise CheckpointError(
                f"{self.file}: tensor {self.name!r} is cut off: the file has become shorter since it was opened. "
                "Leave it alone while it is in use, and start again."
            )
        return raw


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file with all its parts.

    version    2 or 3, of the first part
    alignment  the tensors' data begins at multiples of it, in the first part
    fields     key -> value in file order, without those that only say how the file is split
    tensors    name -> place in file order, part after part
    files      the parts, the first one first
    """

    version: int
    alignment: int
    fields: Mapping[str, FieldValue]
    tensors: Mapping[str, GgufTensor]
    files: tuple[Path, ...]


def read_gguf(path: Path) -> GgufFile:
    """The file at `path`, together with all other parts where it is the first of several.

    Headers are read and checked; no weight is. Raises CheckpointError that names the file and what is wrong with it.
    """
    header = read_header(path)
    count = _split(path, header, SPLIT_COUNT) or 1
    if count > 1:
        return _joined(path, header, count)
    return _made(header, {path: header})


def part_name(stem: str, number: int, count: int) -> str:
    """The file name of part `number` (from 1 on) of `count`."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def _joined(path: Path, first: Header, count: int) -> GgufFile:
    match = _PART.fullmatch(path.name)
    stem = match["stem"] if match else "NAME"
    number = _split(path, first, SPLIT_NUMBER)
    if number != 0:
        raise CheckpointError(
            f"{path}: is part {'?' if number is None else number + 1} of {count}. "
            f"Give the first, {path.with_name(part_name(stem, 1, count))}."
        )
    if path.name != part_name(stem, 1, count):
        raise CheckpointError(
            f"{path}: is the first of {count} parts, which are found by name. "
            f"Rename it to {part_name(stem, 1, count)}, and the others accordingly."
        )
    files = [path.with_name(part_name(stem, part, count)) for part in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of its {count} parts are missing, the first of them {missing[0]}. "
            "Put all parts into one directory."
        )
    headers = {path: first}
    for index, file in enumerate(files[1:], start=1):
        headers[file] = _part(file, index, count)
    return _made(first, headers)


def _part(file: Path, number: int, count: int) -> Header:
    header = read_header(file)
    found = _split(file, header, SPLIT_NUMBER), _split(file, header, SPLIT_COUNT)
    if found != (number, count):
        raise CheckpointError(
            f"{file}: has {SPLIT_NUMBER} {found[0]} and {SPLIT_COUNT} {found[1]}, its name says {number} and {count}. "
            "The parts are of different files: fetch all of them again."
        )
    return header


def _made(first: Header, headers: Mapping[Path, Header]) -> GgufFile:
    tensors: dict[str, GgufTensor] = {}
    for file, header in headers.items():
        for name, extent in header.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: tensor {shown(name)} is already in {tensors[name].file.name}. "
                    "The parts are of different files: fetch all of them again."
                )
            tensors[name] = _placed(name, file, extent)
        said = _split(file, header, SPLIT_TENSORS) if len(headers) > 1 else None
        if said not in (None, total := sum(len(header.tensors) for header in headers.values())):
            raise CheckpointError(
                f"{file}: says that the parts hold {said} tensors together, they hold {total}. "
                "The parts are of different files: fetch all of them again."
            )
    fields = {key: value for key, value in first.fields.items() if key not in SPLIT_KEYS}
    return GgufFile(first.version, first.alignment, fields, tensors, tuple(headers))


def _placed(name: str, file: Path, extent: Extent) -> GgufTensor:
    return GgufTensor(name, extent.shape, extent.type_number, file, extent.position, extent.size_bytes)


def _split(file: Path, header: Header, key: str) -> int | None:
    """The field `key`, a small number, or None where there is none."""
    field = header.fields.get(key)
    if field is None:
        return None
    if field.count is not None or type(field.value) is not int or not 0 <= field.value < 1 << 31:
        raise CheckpointError(f"{file}: {key} must be a number from 0 on. Split the file again with llama-gguf-split.")
    return field.value
