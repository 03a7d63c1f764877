"""The bound of a paired difference: against the likelihood itself, and how often it covers the truth."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom

from pennyweight.evaluate.confidence import ERRORS, items_for, paired_bound


@pytest.mark.parametrize(
    ("worse", "better", "items"), [(0, 0, 50), (3, 0, 100), (0, 4, 100), (20, 12, 200), (60, 59, 120)]
)
def test_at_the_bound_the_score_statistic_is_as_many_standard_errors_away(worse: int, better: int, items: int) -> None:
    d = paired_bound(worse, better, items)

    def unlikely(q: float) -> float:
        """- log likelihood of worse, better and the rest with p(better) = q and p(worse) = q + d."""
        counts = {q + d: worse, q: better, 1 - 2 * q - d: items - worse - better}
        return -sum(count * math.log(p) for p, count in counts.items() if count)

    low, high = max(0.0, -d) + 1e-15, (1 - d) / 2 - 1e-15
    q = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    deviation = math.sqrt(items * (2 * q + d - d * d))
    assert (worse - better - items * d) / deviation == pytest.approx(-ERRORS, abs=2e-3)


def test_items_that_do_not_differ_leave_a_bound() -> None:
    assert paired_bound(0, 0, 300) == pytest.approx(ERRORS**2 / (300 + ERRORS**2), rel=1e-12)
    for share in (0.3, 0.02, 0.005):
        needed = items_for(share)
        assert paired_bound(0, 0, needed) <= share < paired_bound(0, 0, needed - 1)


@pytest.mark.parametrize("items", [40, 150])
@pytest.mark.parametrize("worse", [0.005, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_99_of_100_bounds_are_above_what_is_lost(items: int, worse: float, share: float) -> None:
    """Summed over all outcomes, not simulated; better is less likely than worse, as the limits of users are above 0."""
    better, missed = worse * share, 0.0
    most = int(binom.ppf(1 - 1e-8, items, worse)) + 1
    for a in range(most + 1):
        rest, p = items - a, better / (1 - worse)
        # The bound falls with b: those from the first on miss.
        first = next((b for b in range(rest + 1) if paired_bound(a, b, items) < worse - better), None)
        if first is not None:
            missed += float(binom.pmf(a, items, worse) * binom.sf(first - 1, rest, p))
    assert missed <= 0.0105
