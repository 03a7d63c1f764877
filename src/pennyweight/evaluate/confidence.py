"""How sure a loss is: one-sided bounds of 99 % on what was lost between two models on the same items."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Standard errors of a one-sided bound of 99 %. Of several trials on the same data the one that is taken is one that
# looked good, and whoever checks it has a sample too: with both, about 95 % are left.
ERRORS = 2.33
# Halvings of the range of a bound, which leave nothing of it in float64.
_HALVINGS = 60


@dataclass(frozen=True)
class Lost:
    """What was lost of a metric, original minus this, in points; its standard error; its upper bound of 99 %."""

    points: float
    stderr: float
    upper: float


def paired_bound(worse: int, better: int, items: int, *, errors: float = ERRORS) -> float:
    """Upper bound of the difference d = p(worse) - p(better) of paired proportions: of `items`, so many were right
    before and are wrong now, so many the other way.

    The d > (worse - better) / items at which the score statistic is as many standard errors away,

        (worse - better - n d) / sqrt(n (2 q + d (1 - d))) = -errors,

    q = p(better) most likely under d (Tango, "Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design", Statistics in Medicine 17, 1998, 891-908). With no item that differs it
    is errors² / (n + errors²), where mean and standard error would both be 0.

    >>> round(paired_bound(0, 0, 1000), 5), round(paired_bound(12, 4, 1000), 5)
    (0.0054, 0.01955)
    """
    low, high = (worse - better) / items, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _score(worse, better, items, middle) > -errors:
            low = middle
        else:
            high = middle
    return high


def _score(worse: int, better: int, items: int, d: float) -> float:
    a, c = 2 * items, -better * d * (1 - d)
    b = (2 * items - worse + better) * d - worse - better
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = items * (2 * q + d * (1 - d))
    gap = worse - better - items * d
    return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)


def items_for(share: float, *, errors: float = ERRORS) -> int:
    """How many items, none of which differs, show that no more than `share` of them is lost."""
    return math.ceil(errors**2 * (1 / share - 1))
