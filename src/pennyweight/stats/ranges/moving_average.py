"""The moving average of each batch's smallest and largest number."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.base import RangeChooser, parameters_for


@dataclass(frozen=True)
class MovingAverage:
    """low <- low + 0.01 (min x - low) over batches, high likewise, as ONNX Runtime does; see `MovingRange`.

    The only chooser whose result depends on how the data was cut into batches, and on their order.
    """

    name: str = "moving-average"

    def choose(self, histogram: Histogram, scheme: ActivationScheme) -> ActivationParameters:
        return parameters_for(histogram, scheme, low=histogram.moving.low, high=histogram.moving.high)


PROVIDES: tuple[RangeChooser, ...] = (MovingAverage(),)
