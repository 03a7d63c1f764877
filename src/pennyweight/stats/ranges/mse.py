"""The range with which rounding changes the numbers least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pennyweight.core.errors import UsageError
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.base import RangeChooser, parameters_for
from pennyweight.stats.ranges.rounding_error import rounding_error

# Shares of the whole range that are tried first, 1 to 2**-10 in steps of 9 %, and factors for the best of them.
_COARSE = tuple(2.0 ** (-k / 8) for k in range(81))
_FINE = tuple(1 + k / 100 for k in range(-9, 10))

Shares = tuple[float, float]


@dataclass(frozen=True)
class Mse:
    """min over ranges of mean |x - Q(x)|^p, the numbers taken from the histogram; see `rounding_error`.

    Both ends are shares of the smallest and the largest number. One share for both is searched first, then each end by
    itself, twice, then finely. Never worse on the histogram than the whole range. p = 2.4 weighs clipping more.
    """

    p: float = 2.0
    name: str = "mse"

    def __post_init__(self) -> None:
        if not 0 < self.p < 100:
            raise UsageError(f"an error of power {self.p}: give a positive one, such as 2")

    def choose(self, histogram: Histogram, scheme: ActivationScheme) -> ActivationParameters:
        def parameters(shares: Shares) -> ActivationParameters:
            return parameters_for(histogram, scheme, low=shares[0] * histogram.low, high=shares[1] * histogram.high)

        def best(tried: Sequence[Shares]) -> Shares:
            errors = rounding_error(histogram, [parameters(shares) for shares in tried], power=self.p)
            return tried[int(errors.argmin())]

        if histogram.is_one_magnitude or not histogram.peak:
            return parameters((1.0, 1.0))
        return parameters(_search(best, is_two_sided=histogram.low < 0 < histogram.high and not scheme.is_symmetric))


def _search(best: Callable[[Sequence[Shares]], Shares], *, is_two_sided: bool) -> Shares:
    """The shares of the lower and the upper end; `best` picks the first of those with the least error."""
    at = best([(share, share) for share in _COARSE])
    if not is_two_sided:
        return best([at, *((at[0] * factor, at[1] * factor) for factor in _FINE if at[0] * factor <= 1)])
    for grid in (_COARSE, _COARSE):
        at = best([at, *((at[0], share) for share in grid)])
        at = best([at, *((share, at[1]) for share in grid)])
    for _ in range(2):
        at = best([at, *((at[0], at[1] * factor) for factor in _FINE if at[1] * factor <= 1)])
        at = best([at, *((at[0] * factor, at[1]) for factor in _FINE if at[0] * factor <= 1)])
    return at


PROVIDES: tuple[RangeChooser, ...] = (Mse(),)
