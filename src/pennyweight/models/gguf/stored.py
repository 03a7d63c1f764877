"""Where and how a GGUF file stores one tensor of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError


@dataclass(frozen=True)
class Stored:
    """One place that a tensor of a checkpoint, or some of its rows, takes in a GGUF file.

    Rows are the axis before the last, of a vector its only one. Stored are, in this order: the rows `rows`, rearranged
    for rope with `heads`, plus `added`.

    tensor      name in the GGUF file
    shape       of what is stored here, outermost axis first; with `expert` without the axis of the experts
    expert      index in the GGUF tensor [experts, out, in] that holds all experts of a layer, None for a whole tensor
    rows        first row and the row after the last, None for all
    heads       None, or the heads whose rows change from halves (x, y) to pairs (x0, y0, x1, y1, ...)
    added       added to every value, in float32
    is_float32  always stored in float32; others may be quantized, float16 or bfloat16
    """

    tensor: str
    shape: tuple[int, ...]
    is_float32: bool
    expert: int | None = None
    rows: tuple[int, int] | None = None
    heads: int | None = None
    added: float = 0.0

    def row_order(self, rows: int) -> Tensor | None:
        """Index int64 with stored = checkpoint[order] for a checkpoint tensor of `rows` rows; None where all rows keep
        their order. Raises ShapeError where the heads don't divide the rows into pairs."""
        if self.rows is None and self.heads is None:
            return None
        first, last = self.rows or (0, rows)
        order = torch.arange(first, last)
        if self.heads is None:
            return order
        if len(order) % (2 * self.heads):
            raise ShapeError(
                f"{self.tensor}: {len(order)} rows can't be {self.heads} heads of pairs; "
                "config.json and the checkpoint belong to different models"
            )
        return order.reshape(self.heads, 2, -1).transpose(1, 2).reshape(-1)

    def apply(self, tensor: Tensor) -> Tensor:
        """What is stored of a checkpoint's `tensor`: in its type, with `added` float32."""
        if tensor.ndim:
            axis = max(tensor.ndim - 2, 0)
            order = self.row_order(tensor.shape[axis])
            tensor = tensor if order is None else tensor.index_select(axis, order.to(tensor.device))
        return tensor.float() + self.added if self.added else tensor

    def invert(self, stored: Tensor) -> Tensor:
        """The rows of the checkpoint's tensor of which `stored` was made: the inverse of `apply` on them."""
        axis = max(stored.ndim - 2, 0)
        if self.heads is not None:
            first = self.rows[0] if self.rows else 0
            order = self.row_order(first + stored.shape[axis])
            assert order is not None
            stored = stored.index_select(axis, torch.argsort(order).to(stored.device))
        return stored.float() - self.added if self.added else stored
