"""Small checkpoints on disk, whole and damaged, written without the code under test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pennyweight.models.base import Checkpoint
from pennyweight.models.checkpoint import open_checkpoint


def stored(directory: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """`tensors` saved by safetensors itself, and opened by ours."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return open_checkpoint(directory)


def write_raw(file: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with `header` (JSON of it, or bytes as they are) that says its header has `length` bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return file


def entry(begin: int, end: int, *, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def bits_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: equal where the tensors are, NaN included."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))
