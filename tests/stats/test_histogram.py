"""Histograms: counts by hand, and nothing depends on how the numbers come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.errors import DataError, UsageError
from pennyweight.stats import histogram as module
from pennyweight.stats.exact_sum import SMALLEST_BITS
from pennyweight.stats.histogram import Histogram

NUMBERS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30)
DISTRIBUTIONS = {
    "normal": lambda n: torch.randn(n),
    "rectified": lambda n: torch.randn(n).relu(),
    "negative": lambda n: -torch.rand(n) - 3,
    "cauchy": lambda n: torch.randn(n) / torch.randn(n),
    "tiny and huge": lambda n: (torch.randn(n) * torch.exp(30 * torch.randn(n))).clamp(-1e38, 1e38),
}


def gathered(parts: Sequence[Tensor], bins: int = 2048) -> Histogram:
    found = Histogram.zero(bins)
    for part in parts:
        found = found.update(part)
    return found


def same(one: Histogram, other: Histogram) -> bool:
    names = ("bins", "below", "exponent", "count", "zeros", "low", "high", "total", "squares")
    return torch.equal(one.counts, other.counts) and all(getattr(one, n) == getattr(other, n) for n in names)


def by_hand(numbers: Sequence[float], bins: int) -> tuple[int, int, list[int]]:
    """exponent, below and counts, in fractions: every width is tried from the narrowest on."""
    exponent = -126
    while True:
        width = Fraction(2) ** exponent
        place = [
            math.floor(Fraction(x) / width) if x > 0 else -1 - math.floor(Fraction(-x) / width) for x in numbers if x
        ]
        below, above = max([-p for p in place if p < 0], default=0), max([p + 1 for p in place if p >= 0], default=0)
        if below + above <= bins:
            return exponent, below, [place.count(p) for p in range(-below, above)]
        exponent += 1


def test_counts_by_hand() -> None:
    found = Histogram.zero(8).update(torch.tensor([0.0, 0.5, 1.0, 1.5, -1.0, 3.9, -2.5, -0.0]))
    assert (found.width, found.below, found.counts.tolist()) == (1.0, 3, [1, 1, 0, 1, 2, 0, 1])
    assert (found.count, found.zeros, found.low, found.high) == (8, 2, -2.5, float(torch.tensor(3.9)))
    assert [side.tolist() for side in found.sides] == [[0, 1, 1], [1, 2, 0, 1]]
    assert found.magnitudes.tolist() == [1, 3, 1, 1]
    start, stop = found.bounds
    assert start.tolist() == [-2.5, -2, -1, 0, 1, 2, 3]
    assert stop.tolist() == [-2, -1, 0, 1, 2, 3, found.high]


def test_the_width_doubles_and_neighbours_join() -> None:
    found = Histogram.zero(4).update(torch.tensor([0.1, 0.3, 0.6, 0.9]))
    assert (found.width, found.counts.tolist()) == (0.25, [1, 1, 1, 1])
    found = found.update(torch.tensor([1.5]))
    assert (found.width, found.counts.tolist()) == (0.5, [2, 2, 0, 1])
    found = found.update(torch.tensor([-0.1]))
    assert (found.width, found.below, found.counts.tolist()) == (1.0, 1, [1, 4, 1])


@given(numbers=NUMBERS, bins=st.sampled_from([2, 3, 7, 64]))
def test_counts_are_those_of_fractions(numbers: list[float], bins: int) -> None:
    found = Histogram.zero(bins).update(torch.tensor(numbers))
    assert (found.exponent, found.below, found.counts.tolist()) == by_hand(numbers, bins)
    unit = Fraction(1, 2**SMALLEST_BITS)
    assert found.total * unit == sum(map(Fraction, numbers))
    assert found.squares * unit == sum(Fraction(x) ** 2 for x in numbers)
    assert (found.low, found.high) == (min(numbers), max(numbers))
    assert found.zeros == numbers.count(0.0)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(DISTRIBUTIONS)),
    cuts=st.lists(st.integers(0, 3000), max_size=5),
    bins=st.sampled_from([2, 100, 2048]),
    chunk=st.sampled_from([64, 1000, 1 << 18]),
    seed=st.integers(0, 99),
)
def test_any_split_any_order_and_any_merge_give_the_same_bits(
    name: str, cuts: list[int], bins: int, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = DISTRIBUTIONS[name](3000)
    expected = gathered([x], bins)
    parts = list(x.tensor_split(sorted(cuts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        assert same(gathered(parts, bins), expected)
        assert same(gathered(parts[::-1], bins), expected)
        assert same(gathered([x[torch.randperm(3000)]], bins), expected)
        merged = gathered([], bins)
        for part in parts:
            merged = gathered([part], bins).merge(merged)
        assert same(merged, expected)


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1000)
    x = torch.randn(50_000)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gathered([x, 3 * x]))
    finally:
        torch.set_num_threads(before)
    assert all(same(found[0], other) for other in found[1:])


def test_numbers_and_their_negatives_are_mirror_images() -> None:
    x = torch.cat([torch.randn(500), torch.tensor([0.5, 1.0, 2.0, 0.0])])
    one, other = gathered([x]), gathered([-x])
    assert one.exponent == other.exponent
    assert torch.equal(one.counts, other.counts.flip(0))
    assert [torch.equal(*pair) for pair in zip(one.sides, other.sides[::-1], strict=True)] == [True, True]


def test_memory_is_bounded_and_most_bins_are_used() -> None:
    x = torch.randn(100_000) * torch.exp(3 * torch.randn(100_000))
    found = gathered(list(x.chunk(10)))
    assert 1024 <= len(found.counts) <= 2048
    assert int(found.counts.sum()) + found.zeros == found.count == 100_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_read_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    assert same(gathered([x]), gathered([x.float()]))


def test_shape_and_strides_do_not_matter_and_nothing_is_edited() -> None:
    x = torch.randn(4, 6, 5, 3)
    expected, kept = gathered([x.flatten()]), x.clone()
    strided = torch.zeros(4, 6, 5, 6)[..., ::2].copy_(x)
    for other in (x, x.to(memory_format=torch.channels_last), x.transpose(0, 3), strided, x.requires_grad_()):
        assert same(gathered([other]), expected)
    assert torch.equal(x, kept)
    assert same(gathered([torch.tensor(2.5)]), gathered([torch.tensor([2.5])]))
    assert same(gathered([torch.tensor(2.5).expand(3, 2)]), gathered([torch.full((6,), 2.5)]))


def test_calibration_may_run_in_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(100)
        found = gathered([x])
    assert same(found.merge(gathered([x.clone()])), gathered([x, x]))


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1.0, 1e30, 3.4e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_number_of_any_size(value: float, sign: int) -> None:
    number = float(torch.tensor(sign * value))
    found = gathered([torch.tensor([number])])
    assert found.low == found.high == number
    assert found.counts.nonzero().flatten().tolist() == [0 if sign < 0 else len(found.counts) - 1]
    assert found.is_one_magnitude
    assert (found.mean, found.mean_square) == (number, number**2)


def test_the_only_magnitude_is_recognised() -> None:
    assert gathered([torch.tensor([0.0, 0.3, -0.3])]).is_one_magnitude
    assert gathered([torch.tensor([0.0]), torch.tensor([0.3])]).is_one_magnitude
    assert not gathered([torch.tensor([0.3, 0.30000004])]).is_one_magnitude
    assert not gathered([torch.zeros(5)]).is_one_magnitude
    assert not gathered([]).is_one_magnitude


def test_nothing_and_zeros() -> None:
    empty = gathered([torch.empty(0), torch.empty(3, 0)])
    assert (empty.count, empty.mean, empty.mean_square, len(empty.counts)) == (0, 0.0, 0.0, 0)
    zeros = gathered([torch.zeros(7), -torch.zeros(2)])
    assert (zeros.count, zeros.zeros, zeros.low, zeros.high, len(zeros.counts)) == (9, 9, 0.0, 0.0, 0)
    for x in (torch.zeros(2), -torch.zeros(2), torch.tensor([-0.0, 0.0]), torch.tensor([0.0, -0.0])):
        found = gathered([x])
        assert math.copysign(1, found.low) == math.copysign(1, found.high) == 1
    x = torch.randn(10)
    assert same(gathered([torch.zeros(7), x]), gathered([torch.cat([torch.zeros(7), x])]))


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "2 NaN of 9"), (float("-inf"), "2 infinite of 9")])
def test_what_is_not_finite_is_an_error_that_says_where(value: float, text: str) -> None:
    x = torch.randn(9)
    x[[3, 5]] = value
    with pytest.raises(DataError, match=f"relu_3: {text} numbers"):
        Histogram.zero().update(x, name="relu_3")


def test_numbers_beyond_float32_and_whole_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="relu_3: 1 infinite of 2"):
        Histogram.zero().update(torch.tensor([1e40, 1.0], dtype=torch.float64), name="relu_3")
    with pytest.raises(DataError, match="tokens: numbers of type torch.int64"):
        Histogram.zero().update(torch.arange(3), name="tokens")


@pytest.mark.parametrize("bins", [0, 1, 1 << 21])
def test_a_histogram_has_a_sensible_number_of_bins(bins: int) -> None:
    with pytest.raises(UsageError, match=f"a histogram of {bins} bins"):
        Histogram.zero(bins)
    with pytest.raises(UsageError, match="histograms of 4 and 8 bins"):
        Histogram.zero(4).merge(Histogram.zero(8))


def test_each_update_is_a_batch_of_the_moving_range() -> None:
    found = gathered([torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0])])
    assert (found.moving.low, found.moving.high, found.moving.batches) == pytest.approx((-1.02, 1.99, 2))
