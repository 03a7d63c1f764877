"""The second moment of a site's input, in other words its Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.matmul import matmul_nt

# Columns per tile: tiles above the diagonal are computed, the others mirrored.
_TILE = 512


@dataclass(frozen=True)
class SecondMoment:
    """sum over rows of x xᵀ [in, in] in float32, and the number of rows; `hessian` is their quotient.

    Only the tiles on and above the diagonal of `total` are kept up to date.
    """

    total: Tensor
    rows: int

    @staticmethod
    def zero(inputs: int, device: torch.device | str = "cpu") -> SecondMoment:
        return SecondMoment(torch.zeros(inputs, inputs, device=device), 0)

    def update_(self, x: Tensor) -> SecondMoment:
        """Add the rows of `x` [tokens, in]; the sum is made in place, the new statistic is returned."""
        inputs = self.total.shape[0]
        if x.ndim != 2 or x.shape[1] != inputs:
            raise ShapeError(f"inputs of shape {tuple(x.shape)} cannot join a second moment of width {inputs}")
        transposed = x.float().T.contiguous()
        parts = chunks(inputs, _TILE)

        def tile(pair: tuple[slice, slice]) -> None:
            self.total[pair] += matmul_nt(transposed[pair[0]], transposed[pair[1]])

        if x.shape[0]:
            parallel_map(tile, [(i, j) for n, i in enumerate(parts) for j in parts[n:]])
        return SecondMoment(self.total, self.rows + x.shape[0])

    def merge_(self, other: SecondMoment) -> SecondMoment:
        """The statistic of both samples together, made in this one's memory."""
        self.total.add_(other.total)
        return SecondMoment(self.total, self.rows + other.rows)

    def hessian_(self) -> Tensor:
        """mean of x xᵀ, float32 [in, in], symmetric to the last bit, made in the statistic's memory, which it uses up."""
        mean = self.total.div_(max(self.rows, 1))
        parts = chunks(mean.shape[0], _TILE)
        for n, i in enumerate(parts):
            upper = mean[i, i].triu()
            mean[i, i] = upper + upper.triu(1).T
            for j in parts[n + 1 :]:
                mean[j, i] = mean[i, j].T
        return mean
