"""How a site's input in the original model goes with its input behind quantized blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.matmul import matmul_nt

# Columns per tile.
_TILE = 512


@dataclass(frozen=True)
class CrossMoment:
    """sum over rows of x̃ xᵀ [in, in] in float32, and the number of rows; `mean_` is their quotient.

    x̃ is a row of the original model's input, x the row of the same token behind the quantized blocks.
    """

    total: Tensor
    rows: int

    @staticmethod
    def zero(inputs: int, device: torch.device | str = "cpu") -> CrossMoment:
        return CrossMoment(torch.zeros(inputs, inputs, device=device), 0)

    def update_(self, original: list[Tensor], x: list[Tensor]) -> CrossMoment:
        """Add the rows of `original` and `x`, tensors [tokens, in] of pairwise the same shape.

        The sum is made in place, the new statistic is returned.
        """
        shapes = [tuple(part.shape) for part in x]
        if [tuple(part.shape) for part in original] != shapes or any(
            shape[1:] != self.total.shape[1:] for shape in shapes
        ):
            raise ShapeError(
                f"inputs of shapes {[tuple(part.shape) for part in original]} and {shapes} cannot join a cross moment "
                f"of width {self.total.shape[0]}: give the same tokens of both"
            )
        rows = sum(part.shape[0] for part in x)
        if not rows:
            return self
        left, right = _columns(original), _columns(x)
        parts = chunks(self.total.shape[0], _TILE)

        def tile(pair: tuple[slice, slice]) -> None:
            self.total[pair] += matmul_nt(left[pair[0]], right[pair[1]])

        parallel_map(tile, [(i, j) for i in parts for j in parts])
        return CrossMoment(self.total, self.rows + rows)

    def merge_(self, other: CrossMoment) -> CrossMoment:
        """The statistic of both samples together, made in this one's memory."""
        self.total.add_(other.total)
        return CrossMoment(self.total, self.rows + other.rows)

    def mean_(self) -> Tensor:
        """mean of x̃ xᵀ, float32 [in, in], in the memory of the statistic, now used up."""
        return self.total.div_(max(self.rows, 1))


def _columns(parts: list[Tensor]) -> Tensor:
    """The rows of all parts as float32 [in, rows], contiguous."""
    transposed = torch.empty(parts[0].shape[1], sum(part.shape[0] for part in parts), device=parts[0].device)

    def copy(columns: slice) -> None:
        torch.cat([part[:, columns].T.float() for part in parts], dim=1, out=transposed[columns])

    parallel_map(copy, chunks(transposed.shape[0], _TILE))
    return transposed
