"""From the smallest to the largest number seen."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.base import RangeChooser, parameters_for


@dataclass(frozen=True)
class MinMax:
    """low = min x, high = max x: nothing is clipped, and one outlier can take most of the steps."""

    name: str = "minmax"

    def choose(self, histogram: Histogram, scheme: ActivationScheme) -> ActivationParameters:
        return parameters_for(histogram, scheme, low=histogram.low, high=histogram.high)


PROVIDES: tuple[RangeChooser, ...] = (MinMax(),)
