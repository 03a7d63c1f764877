"""The header of a safetensors file, read without trusting a byte of it.

    8 bytes   length n of the header, little endian
    n bytes   JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {}}
    the rest  the tensors' bytes, without gaps, in the order of their offsets

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pennyweight.core.errors import CheckpointError

# The format's own limit.
MAX_HEADER_BYTES = 100_000_000
# Far above any real tensor and far below what overflows torch's 64-bit counts.
_MAX_TENSOR_BYTES = 1 << 60
_AGAIN = "The file is damaged or was not fully downloaded: fetch it again"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `begin` and `end` are positions in the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, Entry]:
    """Name -> type, shape and place of every tensor of `file`; raises CheckpointError that names file and tensor."""
    try:
        with open(file, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = _header_length(file, stream.read(8), size)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(raw) != length:
        raise CheckpointError(f"{file}: ends after {len(raw)} of {length} header bytes. {_AGAIN}.")
    header = _parsed(file, raw)
    _check_metadata(file, header.pop("__metadata__", {}))
    data = 8 + length
    entries = {name: _entry(f"{file}: tensor {name!r}", value, data) for name, value in header.items()}
    _check_coverage(file, entries, data=data, size=size)
    return entries


def _header_length(file: Path, prefix: bytes, size: int) -> int:
    if prefix == b"version ":
        raise CheckpointError(f"{file}: is a Git LFS pointer, not the weights themselves. Run `git lfs pull`.")
    if len(prefix) < 8:
        raise CheckpointError(f"{file}: has {size} bytes, a safetensors file has at least 8. {_AGAIN}.")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: says that its header has {length} bytes, at most {MAX_HEADER_BYTES} are allowed. "
            "It is damaged or not a safetensors file: fetch or convert it again."
        )
    if length > size - 8:
        raise CheckpointError(
            f"{file}: says that its header has {length} bytes, but the whole file has {size}. {_AGAIN}."
        )
    return length


def _parsed(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise CheckpointError(f"{file}: the header names {twice!r} twice, each name may occur once. {_AGAIN}.")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not JSON ({error}). {_AGAIN}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is a JSON {type(header).__name__}, expected an object. {_AGAIN}.")
    return header


def _check_metadata(file: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: '__metadata__' in the header must map text to text. {_AGAIN}.")


def _entry(where: str, value: Any, data: int) -> Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where} must have a dtype, a shape and data_offsets in the header. {_AGAIN}.")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where} has the type {value['dtype']!r}; known are {', '.join(DTYPES)}. "
            "Save the model again in one of them."
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_counts(shape):
        raise CheckpointError(f"{where} has the shape {_short(shape)}, expected a list of counts. {_AGAIN}.")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the offsets {_short(offsets)}, expected [begin, end]. {_AGAIN}.")
    _check_length(where, dtype, shape, held=offsets[1] - offsets[0])
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_length(where: str, dtype: torch.dtype, shape: list[int], *, held: int) -> None:
    # The bound leaves empty axes out, so that [0, 2**70] cannot overflow torch either.
    needed, bound = dtype.itemsize, dtype.itemsize
    for length in shape:
        needed, bound = needed * length, bound * max(length, 1)
        if bound > _MAX_TENSOR_BYTES:
            raise CheckpointError(f"{where} has the impossible shape {_short(shape)}. {_AGAIN}.")
    if needed != held:
        raise CheckpointError(
            f"{where} of shape {_short(shape)} and type {dtype} needs {needed} bytes, "
            f"but the header gives it {held}. {_AGAIN}."
        )


def _check_coverage(file: Path, entries: dict[str, Entry], *, data: int, size: int) -> None:
    """The tensors must fill the file from the end of the header to its own end: no overlap, no gap, nothing left."""
    reached, before = data, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise CheckpointError(
                f"{file}: tensor {name!r} ends at byte {entry.end}, but the file has {size}: it is truncated. {_AGAIN}."
            )
        if entry.begin != reached:
            fault = "overlaps" if entry.begin < reached else "leaves a gap after"
            raise CheckpointError(
                f"{file}: tensor {name!r} begins at byte {entry.begin} and {fault} {before}, "
                f"which ends at {reached}. {_AGAIN}."
            )
        reached, before = entry.end, f"tensor {name!r}"
    if reached != size:
        raise CheckpointError(f"{file}: {size - reached} bytes after {before} belong to no tensor. {_AGAIN}.")
