"""Moving averages of ranges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.stats.moving_range import AVERAGING, MovingRange

# A few dozen operations of float64.
ROUNDING = 1e-12
RANGES = st.lists(st.tuples(st.floats(-100, 0), st.floats(0, 100)), max_size=8)


def gathered(ranges: list[tuple[float, float]]) -> MovingRange:
    found = MovingRange()
    for low, high in ranges:
        found = found.update(low, high)
    return found


def test_the_first_batch_counts_as_it_is_and_later_ones_a_hundredth() -> None:
    found = gathered([(-1.0, 2.0), (-3.0, 1.0)])
    assert (found.low, found.high, found.batches) == pytest.approx((-1.02, 1.99, 2))


@given(before=RANGES, after=RANGES)
def test_merging_halves_in_order_is_one_pass(
    before: list[tuple[float, float]], after: list[tuple[float, float]]
) -> None:
    merged = gathered(before).merge(gathered(after))
    expected: list[float] = []
    for low, high in before + after:
        expected = [e + AVERAGING * (v - e) for e, v in zip(expected or [low, high], (low, high), strict=True)]
    assert [merged.low, merged.high] == pytest.approx(expected or [0.0, 0.0], rel=ROUNDING, abs=ROUNDING)
    assert merged.batches == len(before + after)


def test_merging_is_associative_in_any_grouping() -> None:
    one, two, three = gathered([(-1, 1), (-2, 5)]), gathered([(-9, 0), (0, 1), (-1, 3)]), gathered([(-4, 4)])
    left, right = one.merge(two).merge(three), one.merge(two.merge(three))
    assert (left.low, left.high) == pytest.approx((right.low, right.high), rel=ROUNDING)
