"""How large each channel of a site's input is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.core.parallel import chunks, parallel_map

# Columns per chunk.
_COLUMNS = 512


@dataclass(frozen=True)
class Magnitude:
    """sum over rows of |x| [in] in float64, the largest |x| of each channel [in] in float32, and the number of rows."""

    total: Tensor
    largest: Tensor
    rows: int

    @staticmethod
    def zero(inputs: int, device: torch.device | str = "cpu") -> Magnitude:
        return Magnitude(torch.zeros(inputs, dtype=torch.float64, device=device), torch.zeros(inputs, device=device), 0)

    @property
    def mean(self) -> Tensor:
        """mean of |x|, float32 [in]; zeros where there are no rows."""
        return (self.total / max(self.rows, 1)).float()

    def update(self, x: Tensor) -> Magnitude:
        """The statistic with the rows of `x` [tokens, in] as well."""
        inputs = self.total.shape[0]
        if x.ndim != 2 or x.shape[1] != inputs:
            raise ShapeError(f"inputs of shape {tuple(x.shape)} cannot join magnitudes of width {inputs}")
        if not x.shape[0]:
            return self

        def columns(part: slice) -> tuple[Tensor, Tensor]:
            size = x[:, part].float().abs()
            return size.sum(0, dtype=torch.float64), size.amax(0)

        found = parallel_map(columns, chunks(inputs, _COLUMNS))
        total, largest = (torch.cat([pair[n] for pair in found]) for n in (0, 1))
        return self.merge(Magnitude(total, largest, x.shape[0]))

    def merge(self, other: Magnitude) -> Magnitude:
        """The statistic of both samples together."""
        return Magnitude(self.total + other.total, torch.maximum(self.largest, other.largest), self.rows + other.rows)

    def divided(self, s: Tensor) -> Magnitude:
        """The statistic of x / s, s > 0 [in]."""
        return Magnitude(self.total / s, self.largest / s, self.rows)
