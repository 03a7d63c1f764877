"""What a chooser of ranges is, and what the range of any chooser becomes."""

from __future__ import annotations

from typing import Protocol

from pennyweight.core.errors import DataError, UsageError
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram

# Ranges end here, so that every value which can be stored is read as a finite float32: with 2 signed bits and no zero
# point the last one lies twice as far.
_FARTHEST = 2.0**126


class RangeChooser(Protocol):
    @property
    def name(self) -> str: ...
    def choose(self, histogram: Histogram, scheme: ActivationScheme) -> ActivationParameters:
        """Scale and zero point of an edge that holds numbers like those of `histogram`; 0 is read as exactly 0.

        Raises DataError where the histogram is empty, UsageError where the scheme is dynamic.
        """


def parameters_for(histogram: Histogram, scheme: ActivationScheme, *, low: float, high: float) -> ActivationParameters:
    """Those of the range [low, high], widened to hold 0.

    Two kinds of data are an exception. Numbers that are all 0 or of one magnitude get the scale with which they are
    read exactly. A range that has shrunk to 0, though not all numbers are 0, becomes that of all numbers.
    """
    if scheme.is_dynamic:
        raise UsageError(f"{scheme.name} takes its ranges from each tensor as it passes: none is chosen beforehand")
    if not histogram.count:
        raise DataError(
            "no numbers have been seen, so no range can be chosen: run calibration data through the network"
        )
    if low >= 0 >= high:
        low, high = histogram.low, histogram.high
    if histogram.is_one_magnitude and histogram.peak <= _FARTHEST:
        return scheme.parameters(*_exact_range(histogram, scheme))
    return scheme.parameters(max(low, -_FARTHEST), min(high, _FARTHEST))


def _exact_range(histogram: Histogram, scheme: ActivationScheme) -> tuple[float, float]:
    """The range whose scale is the only magnitude there is, divided by a power of two: both are read exactly."""
    steps = scheme.element.largest - scheme.element.smallest
    middle = (steps + 1) / 2
    if scheme.is_symmetric or histogram.low < 0 < histogram.high:
        scale = histogram.peak / (middle / 2)
        return -middle * scale, (steps - middle) * scale
    reach = histogram.peak / middle * steps
    return (-reach, 0.0) if histogram.low < 0 else (0.0, reach)
