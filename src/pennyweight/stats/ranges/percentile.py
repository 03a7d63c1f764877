"""The range that all but a stated share of the numbers lie in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import UsageError
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.base import RangeChooser, parameters_for


@dataclass(frozen=True)
class Percentile:
    """`percent` of all numbers, zeros included, lie in the range; what is cut is cut on both sides alike.

    With n numbers, k = floor(n (100 - percent) / 100) may lie outside: floor(k / 2) on each side, and with a symmetric
    scheme the k of the largest magnitude. An end lies where the next number would if those of its bin were spread
    evenly; with nothing to cut it is the smallest or largest number. 99.99 suits convolutional networks and ruins
    encoders of text, hence the default.
    """

    percent: float = 99.999
    name: str = "percentile"

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise UsageError(f"a range that holds {self.percent} % of the numbers: give more than 0 and at most 100")

    def choose(self, histogram: Histogram, scheme: ActivationScheme) -> ActivationParameters:
        cut = math.floor(histogram.count * (100 - self.percent) / 100)
        if scheme.is_symmetric:
            end = _end(histogram.magnitudes, cut, histogram.width, histogram.peak)
            low, high = max(histogram.low, -end), min(histogram.high, end)
        else:
            negative, positive = histogram.sides
            low = -_end(negative, cut // 2, histogram.width, -histogram.low)
            high = _end(positive, cut // 2, histogram.width, histogram.high)
        return parameters_for(histogram, scheme, low=low, high=high)


def _end(counts: Tensor, cut: int, width: float, peak: float) -> float:
    """The magnitude below which all but `cut` of the numbers lie that `counts` [bins] counts, at most `peak`."""
    if cut == 0:
        return peak
    inside = int(counts.sum()) - cut
    if inside <= 0:
        return 0.0
    reached = counts.cumsum(0)
    k = int(torch.searchsorted(reached, inside))
    before = int(reached[k] - counts[k])
    return min(peak, (k + (inside - before) / int(counts[k])) * width)


PROVIDES: tuple[RangeChooser, ...] = (Percentile(),)
