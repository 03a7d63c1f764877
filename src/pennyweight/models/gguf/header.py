"""The header of one GGUF file, read without trusting a byte of it.

    4 bytes   "GGUF"
    4, 8, 8   version, number of tensors, number of fields; all numbers little endian
    fields    each: key (8 bytes length, then the bytes), 4 bytes type, value
    tensors   each: name, 4 bytes number of dimensions, 8 bytes each dimension (the innermost first), 4 bytes type,
              8 bytes offset from the beginning of the data
    zeros     up to a multiple of the alignment: 32, or what the field general.alignment says
    data      the tensors' bytes, each tensor at a multiple of the alignment

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pennyweight.core.errors import CheckpointError
from pennyweight.models.gguf.fields import NUMBERS, FieldValue, decoded_text
from pennyweight.models.gguf.head import AGAIN, Head, shown

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
# Far above any real model; they bound what a hostile file makes us keep.
_MAX_FIELDS, _MAX_TENSORS = 1 << 16, 1 << 18
_LEAST_FIELD_BYTES, _LEAST_TENSOR_BYTES = 13, 24
# Far above any real tensor and far below what overflows torch's 64-bit counts.
_MAX_TENSOR_BYTES = 1 << 60
# llama.cpp's formats before GGUF, the first four bytes of a file.
_OLD_MAGICS = {b"lmgg", b"fmgg", b"tjgg", b"algg"}
_VALUE_BYTES = {"B": 1, "b": 1, "H": 2, "h": 2, "I": 4, "i": 4, "f": 4, "?": 1, "Q": 8, "q": 8, "d": 8}


@dataclass(frozen=True)
class Extent:
    """One tensor of a file: shape in torch's order, ggml's number of its type, first byte, number of bytes."""

    shape: tuple[int, ...]
    type_number: int
    position: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """What one file says; fields and tensors in its order."""

    version: int
    alignment: int
    fields: Mapping[str, FieldValue]
    tensors: Mapping[str, Extent]


def tensor_bytes(shape: tuple[int, ...], type_number: int) -> int | None:
    """Bytes of a tensor, or None where rows of that length cannot be cut into the type's blocks."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_number)]
    if (shape[-1] if shape else 1) % block:
        return None
    count = 1
    for length in shape:
        count *= length
    return count // block * block_bytes


def padded(count: int, alignment: int) -> int:
    """`count` rounded up to a multiple of `alignment`."""
    return -(-count // alignment) * alignment


def read_header(file: Path) -> Header:
    """What `file` says, checked; raises CheckpointError that names file and tensor or field."""
    try:
        with open(file, "rb", buffering=0) as stream:
            return _parsed(Head(file, stream, os.fstat(stream.fileno()).st_size))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


def _parsed(head: Head) -> Header:
    version = _version(head)
    tensor_count, field_count = head.numbers("QQ", "the number of tensors and fields")
    for what, count, most in (("tensors", tensor_count, _MAX_TENSORS), ("fields", field_count, _MAX_FIELDS)):
        if count > most:
            raise CheckpointError(f"{head.file}: says that it has {count} {what}, at most {most} are read. {AGAIN}.")
    head.expect(tensor_count * _LEAST_TENSOR_BYTES + field_count * _LEAST_FIELD_BYTES, "the list of tensors and fields")
    fields: dict[str, FieldValue] = {}
    for number in range(field_count):
        _read_field(head, f"field {number}", fields)
    alignment = _alignment(head.file, fields)
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for number in range(tensor_count):
        _read_info(head, f"tensor {number}", infos)
    data = padded(head.position, alignment)
    tensors = {name: _extent(f"{head.file}: tensor {shown(name)}", *info, data=data, alignment=alignment)
               for name, info in infos.items()}  # fmt: skip
    _check_places(head, tensors)
    return Header(version, alignment, fields, tensors)


def _version(head: Head) -> int:
    magic = head.take(4, "the mark 'GGUF'") if head.size >= 4 else b""
    if magic == b"vers":
        raise CheckpointError(f"{head.file}: is a Git LFS pointer, not the weights themselves. Run `git lfs pull`.")
    if magic in _OLD_MAGICS:
        raise CheckpointError(
            f"{head.file}: is in a format that llama.cpp used before GGUF. Convert the original model to GGUF again."
        )
    if magic != MAGIC:
        raise CheckpointError(
            f"{head.file}: begins with {magic!r}, a GGUF file begins with {MAGIC!r}. "
            "It is damaged or no GGUF file: fetch it again or give another."
        )
    (version,) = head.numbers("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(
            f"{head.file}: is big-endian, only little-endian GGUF files are read. "
            "Convert it with `gguf-convert-endian`."
        )
    if version not in (2, VERSION):
        raise CheckpointError(
            f"{head.file}: has version {version} of GGUF, 2 and {VERSION} are read. "
            "Convert the original model to GGUF again with a current llama.cpp."
        )
    return int(version)


def _read_field(head: Head, what: str, fields: dict[str, FieldValue]) -> None:
    key = decoded_text(head.text(f"the key of {what}"))
    where = f"field {shown(key)}"
    if not key or key in fields:
        fault = "occurs twice, each key may occur once" if key else f"({what}) has no key"
        raise CheckpointError(f"{head.file}: {where} {fault}. {AGAIN}.")
    (number,) = head.numbers("I", where)
    if number == GGUFValueType.ARRAY:
        number, count = head.numbers("IQ", where)
        kind = _value_type(head.file, where, number, inside=True)
        fields[key] = FieldValue(kind, _raw(head, kind, count, where), count)
    else:
        kind = _value_type(head.file, where, number, inside=False)
        fields[key] = FieldValue(kind, _raw(head, kind, 1, where))


def _raw(head: Head, kind: GGUFValueType, count: int, where: str) -> bytes:
    if kind is GGUFValueType.STRING:
        return head.texts(count, where)
    return head.take(count * _VALUE_BYTES[NUMBERS[kind]], where)


def _value_type(file: Path, where: str, number: int, *, inside: bool) -> GGUFValueType:
    if inside and number == GGUFValueType.ARRAY:
        raise CheckpointError(
            f"{file}: {where} is an array of arrays; llama.cpp reads none, and neither do we. "
            "Write the file without that field."
        )
    try:
        return GGUFValueType(number)
    except ValueError:
        known = ", ".join(f"{kind.value} ({kind.name})" for kind in GGUFValueType)
        raise CheckpointError(f"{file}: {where} has the type {number}; known are {known}. {AGAIN}.") from None


def _alignment(file: Path, fields: Mapping[str, FieldValue]) -> int:
    field = fields.get(ALIGNMENT_KEY)
    if field is None:
        return DEFAULT_ALIGNMENT
    if field.kind is not GGUFValueType.UINT32 or field.count is not None:
        raise CheckpointError(f"{file}: {ALIGNMENT_KEY} must be one UINT32. Write the file again.")
    alignment = int(field.value)
    if alignment == 0 or alignment & (alignment - 1):
        raise CheckpointError(f"{file}: {ALIGNMENT_KEY} is {alignment}, it must be a power of two. {AGAIN}.")
    return alignment


def _read_info(head: Head, what: str, infos: dict[str, tuple[tuple[int, ...], int, int]]) -> None:
    name = decoded_text(head.text(f"the name of {what}"))
    where = f"tensor {shown(name)}"
    if name in infos:
        raise CheckpointError(f"{head.file}: {where} occurs twice, each name may occur once. {AGAIN}.")
    (dimensions,) = head.numbers("I", where)
    if dimensions > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{head.file}: {where} has {dimensions} dimensions, llama.cpp has at most {MAX_DIMENSIONS}. {AGAIN}."
        )
    *lengths, type_number, offset = head.numbers("Q" * dimensions + "IQ", where)
    infos[name] = tuple(reversed(lengths)), type_number, offset


def _extent(where: str, shape: tuple[int, ...], type_number: int, offset: int, *, data: int, alignment: int) -> Extent:
    if type_number not in GGML_QUANT_SIZES:
        known = ", ".join(f"{kind.value} ({kind.name})" for kind in GGML_QUANT_SIZES)
        raise CheckpointError(
            f"{where} has the type {type_number}; known are {known}. "
            "It is damaged, or newer than the installed package: pip install --upgrade gguf."
        )
    # Empty axes are left out, so that [0, 2**63] cannot overflow torch either.
    bound = GGML_QUANT_SIZES[GGMLQuantizationType(type_number)][1]
    for length in shape:
        bound *= max(length, 1)
    size_bytes = tensor_bytes(shape, type_number) if bound <= _MAX_TENSOR_BYTES else None
    if size_bytes is None:
        name = GGMLQuantizationType(type_number).name
        raise CheckpointError(f"{where} has the shape {list(shape)}, impossible for the type {name}. {AGAIN}.")
    if offset % alignment:
        raise CheckpointError(f"{where} has the offset {offset}, which is no multiple of {alignment}. {AGAIN}.")
    return Extent(shape, type_number, data + offset, size_bytes)


def _check_places(head: Head, tensors: Mapping[str, Extent]) -> None:
    """Every tensor inside the file, none over another."""
    reached, before = head.position, "the header"
    ends = {name: extent.position + extent.size_bytes for name, extent in tensors.items()}
    for name, extent in sorted(tensors.items(), key=lambda item: (item[1].position, ends[item[0]])):
        where = f"{head.file}: tensor {shown(name)}"
        if ends[name] > head.size:
            raise CheckpointError(
                f"{where} ends at byte {ends[name]}, but the file has {head.size}: it is truncated. {AGAIN}."
            )
        if extent.position < reached:
            raise CheckpointError(
                f"{where} begins at byte {extent.position} and overlaps {before}, which ends at {reached}. {AGAIN}."
            )
        reached, before = ends[name], f"tensor {shown(name)}"
