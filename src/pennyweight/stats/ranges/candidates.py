"""The ranges worth trying for an edge, and the one that does its consumers least harm."""

from __future__ import annotations

import math
from collections.abc import Callable

from pennyweight.core.errors import DataError
from pennyweight.core.registry import provided
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.base import RangeChooser, parameters_for

# Shares of the whole range, and factors for the range of the least rounding error.
_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_FACTORS = (0.8, 0.9, 1.1, 1.25)


def candidates(histogram: Histogram, scheme: ActivationScheme) -> list[ActivationParameters]:
    """What each chooser takes, and a fan of clipped ranges, each once; the whole range comes first.

    Raises DataError where the histogram is empty, UsageError where the scheme is dynamic.
    """
    choosers: dict[str, RangeChooser] = provided("stats.ranges")
    chosen = {name: chooser.choose(histogram, scheme) for name, chooser in choosers.items()}
    least = chosen["mse"]
    ends = [(share * histogram.low, share * histogram.high) for share in _SHARES]
    ends += [(max(histogram.low, factor * least.low), min(histogram.high, factor * least.high)) for factor in _FACTORS]
    fan = [parameters_for(histogram, scheme, low=low, high=high) for low, high in ends]
    return list(dict.fromkeys([chosen["minmax"], *chosen.values(), *fan]))


def choose_by(
    histogram: Histogram, scheme: ActivationScheme, error: Callable[[ActivationParameters], float]
) -> ActivationParameters:
    """The candidate with the least `error`, such as that of the consumer's output; the first of equals.

    An error that is NaN counts as infinite. Raises DataError where none is finite.
    """
    errors = {found: error(found) for found in candidates(histogram, scheme)}
    finite = {found: value for found, value in errors.items() if math.isfinite(value)}
    if not finite:
        raise DataError(
            f"none of {len(errors)} ranges has a finite error: look for NaN or infinity where the error is measured"
        )
    return min(finite, key=lambda found: finite[found])
