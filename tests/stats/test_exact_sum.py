"""Sums without rounding."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.stats.exact_sum import SMALLEST_BITS, exact_sum_, real, whole

UNIT = Fraction(1, 2**SMALLEST_BITS)
NUMBERS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40)


def summed(x: Tensor) -> int:
    peak = float(x.abs().max()) if len(x) else 0.0
    return exact_sum_(x.clone(), torch.empty_like(x), peak=peak)


@given(NUMBERS)
def test_the_sum_of_numbers_and_of_their_squares_is_that_of_fractions(numbers: list[float]) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)
    assert summed(x) * UNIT == sum(map(Fraction, numbers))
    assert summed(x * x) * UNIT == sum(Fraction(value) ** 2 for value in numbers)


@pytest.mark.parametrize("size", [1, 1000, 1 << 16])
def test_many_numbers_of_far_apart_sizes_are_summed_exactly_in_any_order(size: int) -> None:
    x = (torch.randn(size) * torch.exp(20 * torch.randn(size))).clamp(-1e38, 1e38).double()
    expected = sum(map(Fraction, x.tolist()))
    for order in (x, x.flip(0), x.sort().values):
        assert summed(order) * UNIT == expected


@pytest.mark.parametrize("seed", range(20))
def test_sums_that_grow_are_exact(seed: int) -> None:
    # Numbers of 48 bits, of which 1023 have a sum of 58: more than a float64 holds.
    x = (1 + torch.rand(1023, generator=torch.Generator().manual_seed(seed))).double().square()
    assert summed(x) * UNIT == sum(map(Fraction, x.tolist()))


def test_numbers_that_cancel_leave_nothing() -> None:
    x = torch.randn(1001).double()
    assert summed(torch.cat([x, -x])) == 0


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 2.0**-298, 3.0e38**2])
def test_whole_and_real_are_inverse(value: float) -> None:
    assert real(whole(value)) == value
