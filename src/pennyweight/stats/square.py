"""How large the squares of each channel of a site's input are: the diagonal of its second moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.core.parallel import chunks, parallel_map

# Columns per chunk.
_COLUMNS = 512


@dataclass(frozen=True)
class Square:
    """sum over rows of x² [in] in float64, and the number of rows."""

    total: Tensor
    rows: int

    @staticmethod
    def zero(inputs: int, device: torch.device | str = "cpu") -> Square:
        return Square(torch.zeros(inputs, dtype=torch.float64, device=device), 0)

    @property
    def mean(self) -> Tensor:
        """mean of x², float32 [in]; zeros where there are no rows."""
        return (self.total / max(self.rows, 1)).float()

    def update(self, x: Tensor) -> Square:
        """The statistic with the rows of `x` [tokens, in] as well; squares in float32, sums in float64."""
        inputs = self.total.shape[0]
        if x.ndim != 2 or x.shape[1] != inputs:
            raise ShapeError(f"inputs of shape {tuple(x.shape)} cannot join squares of width {inputs}")
        if not x.shape[0]:
            return self
        parts = parallel_map(
            lambda part: x[:, part].float().square().sum(0, dtype=torch.float64), chunks(inputs, _COLUMNS)
        )
        return self.merge(Square(torch.cat(parts), x.shape[0]))

    def merge(self, other: Square) -> Square:
        """The statistic of both samples together."""
        return Square(self.total + other.total, self.rows + other.rows)
