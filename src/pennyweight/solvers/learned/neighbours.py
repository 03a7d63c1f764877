"""The neighbours of a code: the next values of its number format, on either side."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.formats import NumberFormat
from pennyweight.schemes import QuantizedWeight


@dataclass(frozen=True)
class Ladder:
    """The values that a number format's encoder gives, in rising order; neighbours lie one rung apart.

    codes   uint8 [rungs]: the code of each
    rungs   int16 [2**bits]: the rung nearest to each code's value; several codes may share one, as +0 and -0 do
    """

    codes: Tensor
    rungs: Tensor

    @staticmethod
    def of(element: NumberFormat, device: torch.device) -> Ladder:
        table = element.decode(torch.arange(2**element.bits, dtype=torch.uint8, device=device))
        # Codes of NaN and infinity belong to no weight; what stands here for them is never looked up.
        nearest = element.nearest(table.nan_to_num(0.0))
        values = torch.unique(nearest)
        return Ladder(element.encode(values), torch.searchsorted(values, nearest).to(torch.int16))

    def moved(self, weight: QuantizedWeight, steps: Tensor) -> QuantizedWeight:
        """`weight` with every code moved by `steps` int8 [out, in] rungs, at most to the end of the ladder."""
        before = self.rungs[weight.codes.int()]
        after = (before + steps).clamp_(0, len(self.codes) - 1)
        # A code that stays is kept as it is: another of the same value may decode to -0.
        codes = torch.where(after == before, weight.codes, self.codes[after.int()])
        return replace(weight, codes=codes)

    def beside(self, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
        """The decoded neighbours float32 [out, in] one rung below and above; at an end of the ladder, itself."""
        one = torch.ones(weight.shape, dtype=torch.int8, device=weight.codes.device)
        return self.moved(weight, -one).dequantize(), self.moved(weight, one).dequantize()
