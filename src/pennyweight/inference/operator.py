"""Packed weights as operators of torch, for graphs that torch.compile and torch.export make.

    pennyweight::packed_product(x, storages, biases, layouts, activations) -> outputs
    pennyweight::packed_rows(ids, storage, layout, dtype) -> rows

`layouts` describe the storages in text: a graph knows by it which shapes come out, and no header is read from a storage
that lies on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor

from pennyweight.core.errors import UsageError
from pennyweight.kernels.layout import Layout
from pennyweight.kernels.packed import Activations, PackedMatrix, multiply


def described(layouts: Sequence[Layout]) -> str:
    """The text that the operators take."""
    kinds = [asdict(layout) | {"scale": str(layout.scale).removeprefix("torch.")} for layout in layouts]
    return json.dumps(kinds)


@lru_cache(maxsize=4096)
def _layouts(text: str) -> tuple[Layout, ...]:
    return tuple(Layout(**(kind | {"scale": getattr(torch, kind["scale"])})) for kind in json.loads(text))


def check_activations(activations: Activations | str) -> Activations:
    """Raises UsageError for what is neither "exact" nor "int8"."""
    if activations not in get_args(Activations):
        raise UsageError(f"activations={activations!r}: give 'exact' or 'int8'")
    return activations  # type: ignore[return-value]


def rows_of(ids: Tensor, matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [...] decoded in float32, as `dtype` [..., cols]; raises IndexError as a look-up does."""
    rows, cols = matrix.shape
    if not ids.numel():
        return torch.empty(*ids.shape, cols, dtype=dtype, device=ids.device)
    first, last = int(ids.min()), int(ids.max())
    if first < 0 or last >= rows:
        raise IndexError(f"ids from {first} to {last} are out of range: the table has {rows} rows")
    return matrix.decode(ids.reshape(-1)).to(dtype).view(*ids.shape, cols)


@torch.library.custom_op("pennyweight::packed_product", mutates_args=())
def packed_product(
    x: Tensor, storages: list[Tensor], biases: list[Tensor | None], layouts: str, activations: str
) -> list[Tensor]:
    """`kernels.packed.multiply` of `x` [..., cols] with each of the matrices."""
    matrices = [PackedMatrix(layout, storage) for layout, storage in zip(_layouts(layouts), storages, strict=True)]
    return multiply(x, matrices, biases=biases, activations=check_activations(activations))


@packed_product.register_fake
def _(x: Tensor, storages: list[Tensor], biases: list[Tensor | None], layouts: str, activations: str) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], layout.rows) for layout in _layouts(layouts)]


@torch.library.custom_op("pennyweight::packed_rows", mutates_args=())
def packed_rows(ids: Tensor, storage: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """`rows_of` as an operator."""
    [known] = _layouts(layout)
    return rows_of(ids, PackedMatrix(known, storage), dtype)


@packed_rows.register_fake
def _(ids: Tensor, storage: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    return torch.empty(*ids.shape, _layouts(layout)[0].cols, dtype=dtype, device=ids.device)
