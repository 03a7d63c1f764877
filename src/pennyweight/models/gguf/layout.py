"""GGUF files whose every byte but the weights is fixed before any weight is solved."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pennyweight.core.errors import ContainerError, ShapeError
from pennyweight.models.gguf.fields import FieldValue, encoded_text
from pennyweight.models.gguf.file import SPLIT_COUNT, SPLIT_KEYS, SPLIT_NUMBER, SPLIT_TENSORS, part_name
from pennyweight.models.gguf.header import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    VERSION,
    padded,
    tensor_bytes,
)

# llama.cpp keeps a name in 64 bytes, of which the last is 0.
MAX_NAME_BYTES = 63
_MAX_PARTS = 65535

# Name, shape in torch's order, ggml's number of the type, bytes.
TensorEntry = tuple[str, Sequence[int], int, int]


@dataclass(frozen=True)
class GgufPart:
    """One file: its name, its first bytes, the byte at which each of its tensors begins, and its size.

    What lies between and behind the tensors is zeros.
    """

    file: str
    header: bytes
    positions: Mapping[str, int]
    size_bytes: int


def header_bytes(
    fields: Mapping[str, FieldValue], tensors: Sequence[TensorEntry], *, alignment: int = DEFAULT_ALIGNMENT
) -> tuple[bytes, dict[str, int]]:
    """All of a file before its data, zeros up to the alignment included, and the byte at which each tensor begins.

    Tensors lie in their order, each at the next multiple of `alignment`; the file must end at one too (llama.cpp reads
    the padding of the last tensor). An alignment other than 32 is added to the fields where they do not have it.
    Raises ContainerError for what llama.cpp would not read, ShapeError where type, shape and bytes disagree.
    """
    fields = _with_alignment(fields, alignment)
    _check_names(tensors)
    infos, offsets, offset = [], {}, 0
    for name, shape, type_number, size_bytes in tensors:
        infos.append(_info(name, shape, type_number, size_bytes, offset=offset))
        offsets[name] = offset
        offset += padded(size_bytes, alignment)
    if "" in fields:
        raise ContainerError(f"a GGUF field needs a key: {fields['']} has none")
    head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields))
    listed = b"".join(encoded_text(key) + value.encoded for key, value in fields.items())
    header = head + listed + b"".join(infos)
    header += bytes(padded(len(header), alignment) - len(header))
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def split_layout(
    stem: str,
    fields: Mapping[str, FieldValue],
    tensors: Sequence[TensorEntry],
    *,
    max_file_bytes: int,
    alignment: int = DEFAULT_ALIGNMENT,
) -> list[GgufPart]:
    """The files that hold `tensors` in their order, each with at most `max_file_bytes` of tensors (one at least).

    One file is called `STEM.gguf`; several are numbered, and the first holds all fields, as llama-gguf-split makes
    them. Raises ContainerError and ShapeError as `header_bytes` does, and ContainerError for too many files.
    """
    taken = sorted(fields.keys() & set(SPLIT_KEYS))
    if taken:
        raise ContainerError(
            f"{', '.join(taken)} cannot be given: these fields say how the file is split. Leave them out"
        )
    _check_names(tensors)
    groups = _groups(tensors, max_file_bytes, alignment)
    if len(groups) == 1:
        return [_part(f"{stem}.gguf", fields, tensors, alignment)]
    if len(groups) > _MAX_PARTS:
        raise ContainerError(
            f"{max_file_bytes} bytes a file would make {len(groups)} files, GGUF counts up to {_MAX_PARTS}: allow more"
        )
    parts = []
    for index, group in enumerate(groups):
        said = {
            **(fields if index == 0 else {}),
            SPLIT_NUMBER: FieldValue.of(index, GGUFValueType.UINT16),
            SPLIT_TENSORS: FieldValue.of(len(tensors), GGUFValueType.INT32),
            SPLIT_COUNT: FieldValue.of(len(groups), GGUFValueType.UINT16),
        }
        parts.append(_part(part_name(stem, index + 1, len(groups)), said, group, alignment))
    return parts


def _groups(tensors: Sequence[TensorEntry], most: int, alignment: int) -> list[list[TensorEntry]]:
    groups: list[list[TensorEntry]] = [[]]
    held = 0
    for entry in tensors:
        size = padded(entry[3], alignment)
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += size
    return groups


def _part(file: str, fields: Mapping[str, FieldValue], tensors: Sequence[TensorEntry], alignment: int) -> GgufPart:
    header, positions = header_bytes(fields, tensors, alignment=alignment)
    return GgufPart(file, header, positions, len(header) + sum(padded(entry[3], alignment) for entry in tensors))


def _check_names(tensors: Sequence[TensorEntry]) -> None:
    names = [entry[0] for entry in tensors]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ContainerError(f"{twice}: given twice, a GGUF file holds each name once: rename one")


def _with_alignment(fields: Mapping[str, FieldValue], alignment: int) -> Mapping[str, FieldValue]:
    if alignment < 1 or alignment & (alignment - 1):
        raise ContainerError(f"a GGUF file cannot be aligned to {alignment} bytes: give a power of two")
    stored = FieldValue.of(alignment, GGUFValueType.UINT32)
    if ALIGNMENT_KEY in fields:
        if fields[ALIGNMENT_KEY] != stored:
            raise ContainerError(
                f"{ALIGNMENT_KEY} does not say UINT32 {alignment}, the alignment asked for: leave it out"
            )
        return fields
    return fields if alignment == DEFAULT_ALIGNMENT else {**fields, ALIGNMENT_KEY: stored}


def _info(name: str, shape: Sequence[int], type_number: int, size_bytes: int, *, offset: int) -> bytes:
    raw = encoded_text(name)
    if len(raw) - 8 > MAX_NAME_BYTES:
        raise ContainerError(f"{name}: has {len(raw) - 8} bytes, llama.cpp reads names of at most {MAX_NAME_BYTES}")
    if len(shape) > MAX_DIMENSIONS:
        raise ContainerError(
            f"{name}: has {len(shape)} dimensions, llama.cpp has at most {MAX_DIMENSIONS}: flatten some"
        )
    if type_number not in GGML_QUANT_SIZES:
        raise ContainerError(f"{name}: ggml has no type {type_number}; it has {', '.join(map(str, GGML_QUANT_SIZES))}")
    needed = tensor_bytes(tuple(shape), type_number)
    if needed != size_bytes:
        held = "cannot be cut into its blocks" if needed is None else f"has {needed} bytes, not {size_bytes}"
        raise ShapeError(f"{name}: {list(shape)} of type {GGMLQuantizationType(type_number).name} {held}")
    return raw + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_number, offset)
