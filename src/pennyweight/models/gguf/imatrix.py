"""Importance matrices of llama.cpp: for each weight the mean square of each of its inputs.

GGUF: for a weight NAME two float32 tensors, `NAME.in_sum2` [rows, in], the sums of squares, and `NAME.counts`
[rows, 1], the number of inputs in each sum. There is one row for a matrix and one an expert for experts; a weight of
several matrices that all see every token has one row of all their sums. Fields: general.type "imatrix",
imatrix.datasets (strings), imatrix.chunk_count and imatrix.chunk_size (UINT32).

Legacy, all numbers int32 or float32: the number of entries; for each the length of its name, the name, the number of
calls n, the number of values, the values, which are n times the means; then, both optional, the number of chunks and
the dataset's length and name. Rows of experts follow one another, their counts are lost.

An expert without any input counts as one whose inputs all have the mean square 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType
from torch import Tensor

from pennyweight.core.errors import CheckpointError, ContainerError, ShapeError
from pennyweight.core.files import replacing
from pennyweight.models.gguf.fields import FieldValue, decoded_text, encoded_text
from pennyweight.models.gguf.file import GgufTensor, read_gguf
from pennyweight.models.gguf.head import shown
from pennyweight.models.gguf.header import MAGIC
from pennyweight.models.gguf.layout import split_layout

_SUMS, _COUNTS = ".in_sum2", ".counts"
_AGAIN = "Make it again with llama-imatrix"
# Far above any real model; it bounds what a hostile file makes us keep.
_MAX_ENTRIES = 1 << 16


@dataclass(frozen=True)
class Importance:
    """How large the inputs of a weight are.

    values  float32 [rows, in], means of squares; all 1 in a row without inputs
    counts  int64 [rows], how many inputs are in each mean (read from a legacy file: chunks, in place of tokens)
    """

    values: Tensor
    counts: Tensor

    def for_weight(self, name: str, shape: Sequence[int]) -> Tensor:
        """The values as [experts or 1, in] for the weight `name` [out, in] or [experts, out, in].

        Raises ShapeError where their number is another.
        """
        experts = shape[0] if len(shape) == 3 else 1
        if not 2 <= len(shape) <= 3 or self.values.numel() != experts * shape[-1]:
            raise ShapeError(
                f"{name}: the importance matrix has {self.values.numel()} values, a weight of shape {list(shape)} "
                f"needs {experts} x {shape[-1] if shape else 0}. Make the matrix again from this very model."
            )
        return self.values.reshape(experts, shape[-1])


def read_imatrix(path: Path) -> dict[str, Importance]:
    """Name of the weight in GGUF -> its importance, of a file in either format.

    Raises CheckpointError that names file and entry for what is damaged, not finite or negative.
    """
    try:
        with open(path, "rb") as stream:
            is_gguf = stream.read(4) == MAGIC
            stream.seek(0)
            found = _read_gguf(path) if is_gguf else _read_legacy(path, stream)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    for name, entry in found.items():
        if not (entry.values.isfinite() & (entry.values >= 0)).all():
            raise CheckpointError(f"{path}: {shown(name)} has values that are negative or not finite. {_AGAIN}.")
    return found


def write_imatrix(
    path: Path,
    entries: Mapping[str, Importance],
    *,
    dataset: str,
    chunk_size: int,
    chunk_count: int,
    legacy: bool = False,
) -> None:
    """Write `entries`, in order of their names, as llama-imatrix does, in GGUF or in the legacy format.

    `chunk_size` is in tokens. The values come back as they are but for the last bit (what is stored is a product).
    Raises ContainerError for entries that the format cannot hold.
    """
    if not entries:
        raise ContainerError(f"{path}: an importance matrix needs at least one entry")
    if not 1 <= chunk_size < 1 << 31:
        raise ContainerError(f"{path}: chunks of {chunk_size} tokens cannot be stored; give 1 or more")
    for name, entry in entries.items():
        _check(name, entry)
    ordered = dict(sorted(entries.items(), key=lambda item: encoded_text(item[0])[8:]))
    if legacy:
        pieces = _legacy_bytes(ordered, dataset, chunk_size, chunk_count)
    else:
        pieces = _gguf_bytes(ordered, dataset, chunk_size, chunk_count)
    with replacing(path) as stream:
        stream.writelines(pieces)


def _read_gguf(path: Path) -> dict[str, Importance]:
    tensors = read_gguf(path).tensors
    names = {name.removesuffix(suffix) for name in tensors for suffix in (_SUMS, _COUNTS) if name.endswith(suffix)}
    if not names:
        raise CheckpointError(f"{path}: is a GGUF file without importances. Give one that llama-imatrix wrote.")
    found = {}
    for name in sorted(names):
        where = f"{path}: {shown(name)}"
        sums, counts = (_floats(where, tensors.get(name + suffix), suffix) for suffix in (_SUMS, _COUNTS))
        if sums.numel() % counts.numel():
            raise CheckpointError(f"{where} has {sums.numel()} sums but {counts.numel()} counts. {_AGAIN}.")
        if not ((counts >= 0) & (counts < 1 << 62)).all():
            raise CheckpointError(f"{where} has counts that are negative or not finite. {_AGAIN}.")
        whole = (counts.double() + 0.5).floor().long()
        means = sums.reshape(whole.numel(), -1) / whole.float()[:, None]
        found[name] = Importance(torch.where(whole[:, None] > 0, means, 1.0), whole)
    return found


def _floats(where: str, tensor: GgufTensor | None, suffix: str) -> Tensor:
    if tensor is None or tensor.type_number != GGMLQuantizationType.F32 or tensor.size_bytes == 0:
        raise CheckpointError(f"{where} needs a float32 tensor with the suffix {suffix}. {_AGAIN}.")
    return tensor.read().view(torch.float32)


def _read_legacy(path: Path, stream: BinaryIO) -> dict[str, Importance]:
    left = os.fstat(stream.fileno()).st_size

    def take(count: int, what: str) -> bytes:
        nonlocal left
        if not 0 <= count <= left or len(raw := stream.read(count)) < count:
            raise CheckpointError(
                f"{path}: {what} would have {count} bytes where {left} are left: it is truncated, or no importance "
                f"matrix. {_AGAIN}."
            )
        left -= count
        return raw

    def number(what: str) -> int:
        return int.from_bytes(take(4, what), "little", signed=True)

    entries = number("the number of entries")
    if not 1 <= entries <= _MAX_ENTRIES:
        raise CheckpointError(
            f"{path}: is neither GGUF nor a legacy importance matrix: it would have {entries} entries, "
            f"1 to {_MAX_ENTRIES} are read. {_AGAIN}."
        )
    found: dict[str, Importance] = {}
    for index in range(entries):
        name = decoded_text(take(number(f"entry {index}"), f"the name of entry {index}"))
        where = f"entry {shown(name)}"
        calls, count = number(where), number(where)
        if not name or name in found or count < 1:
            raise CheckpointError(f"{path}: {where} has no name, one that occurs twice, or no values. {_AGAIN}.")
        values = torch.frombuffer(bytearray(take(4 * count, where)), dtype=torch.float32)
        means = values / calls if calls > 0 else values
        found[name] = Importance(means[None], torch.tensor([max(calls, 0)]))
    if left:
        number("the number of chunks")
    if left:
        take(number("the dataset"), "the name of the dataset")
    if left:
        raise CheckpointError(f"{path}: {left} bytes after the last entry belong to nothing. {_AGAIN}.")
    return found


def _check(name: str, entry: Importance) -> None:
    values, counts = entry.values, entry.counts
    if values.dtype != torch.float32 or values.ndim != 2 or values.numel() == 0 or counts.shape != values.shape[:1]:
        raise ContainerError(
            f"{name}: values {values.dtype} {list(values.shape)} with counts {list(counts.shape)} given, "
            "float32 [rows, in] with [rows] needed"
        )
    if not (values.isfinite() & (values >= 0)).all() or (counts < 0).any():
        raise ContainerError(f"{name}: means of squares and counts must be finite and not negative")


def _gguf_bytes(entries: Mapping[str, Importance], dataset: str, chunk_size: int, chunk_count: int) -> list[bytes]:
    fields = {
        "general.type": FieldValue.of("imatrix", GGUFValueType.STRING),
        "imatrix.datasets": FieldValue.array([dataset], GGUFValueType.STRING),
        "imatrix.chunk_count": FieldValue.of(chunk_count, GGUFValueType.UINT32),
        "imatrix.chunk_size": FieldValue.of(chunk_size, GGUFValueType.UINT32),
    }
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        counts = entry.counts.float()
        # ggml drops outer dimensions of 1.
        rows = (len(counts),) if len(counts) > 1 else ()
        tensors[name + _SUMS] = _finite(name, entry.values * counts[:, None]).reshape(*rows, -1)
        tensors[name + _COUNTS] = counts.reshape(*rows, 1)
    listed = [(name, tuple(t.shape), int(GGMLQuantizationType.F32), 4 * t.numel()) for name, t in tensors.items()]
    (part,) = split_layout("imatrix", fields, listed, max_file_bytes=1 << 62)
    pieces, end = [part.header], len(part.header)
    for name, position in part.positions.items():
        raw = _raw(tensors[name])
        pieces += [bytes(position - end), raw]
        end = position + len(raw)
    return [*pieces, bytes(part.size_bytes - end)]


def _legacy_bytes(entries: Mapping[str, Importance], dataset: str, chunk_size: int, chunk_count: int) -> list[bytes]:
    pieces = [_int32(len(entries))]
    for name, entry in entries.items():
        raw = encoded_text(name)[8:]
        # Rounded up and at least 1, so that no entry with data, or with rows of ones, is divided by 0.
        calls = max(-(-int(entry.counts.max()) // chunk_size), 1)
        values = torch.where(entry.counts[:, None] > 0, entry.values, 1.0)
        pieces += [_int32(len(raw)), raw, _int32(calls), _int32(values.numel())]
        pieces.append(_raw(_finite(name, values * calls)))
    text = encoded_text(dataset)[8:]
    return [*pieces, _int32(chunk_count), _int32(len(text)), text]


def _int32(value: int) -> bytes:
    return FieldValue.of(value, GGUFValueType.INT32).raw


def _finite(name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ContainerError(f"{name}: its sums of squares are beyond float32. Calibrate with fewer tokens")
    return values


def _raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
