"""Percentiles: exact where the bins allow it, within a bin of the sorted numbers otherwise."""

from __future__ import annotations

import math

import pytest
import torch

from pennyweight.core.errors import UsageError
from pennyweight.formats.integer import Int
from pennyweight.schemes.activation import ActivationScheme
from pennyweight.stats.ranges.minmax import MinMax
from pennyweight.stats.ranges.percentile import Percentile, _end
from tests.stats.ranges.histograms import UINT8_ASYMMETRIC, gelu_like, histogram_of

SYMMETRIC = ActivationScheme(Int(8), is_symmetric=True)


@pytest.mark.parametrize(
    ("cut", "end"),
    # 4 numbers in [0, 0.5), none in [0.5, 1), 2 in [1, 1.5), one of them and the last 1.4 the largest.
    [(0, 1.4), (1, 1.25), (2, 0.5), (3, 0.375), (5, 0.125), (6, 0.0), (9, 0.0)],
)
def test_an_end_lies_where_the_next_number_would(cut: int, end: float) -> None:
    assert _end(torch.tensor([4, 0, 2]), cut, 0.5, 1.4) == end


def test_without_enough_numbers_to_cut_nothing_is() -> None:
    histogram = histogram_of(torch.randn(1000))
    assert Percentile().choose(histogram, UINT8_ASYMMETRIC) == MinMax().choose(histogram, UINT8_ASYMMETRIC)
    assert Percentile(100).choose(histogram, SYMMETRIC) == MinMax().choose(histogram, SYMMETRIC)


@pytest.mark.parametrize("percent", [50, 90, 99, 99.9, 99.99])
def test_ends_are_within_a_bin_of_the_sorted_numbers(percent: float) -> None:
    x = torch.cat([gelu_like(20_000), torch.zeros(5000)])
    histogram, ordered = histogram_of(x), x.sort().values
    k = math.floor(len(x) * (100 - percent) / 100)
    found = Percentile(percent).choose(histogram, UINT8_ASYMMETRIC)
    low, high = float(ordered[k // 2]), float(ordered[-1 - k // 2])
    # Half a step more: the zero point is rounded.
    tolerance = histogram.width + found.scale / 2
    assert found.low == pytest.approx(min(low, 0.0), abs=tolerance)
    assert found.high == pytest.approx(high, abs=tolerance)
    found = Percentile(percent).choose(histogram, SYMMETRIC)
    expected = max(float(x.abs().sort().values[-1 - k]) / 127, 1e-9)
    assert found.scale == pytest.approx(expected, abs=histogram.width / 127)


def test_one_outlier_among_many_is_cut() -> None:
    x = torch.cat([torch.rand(300_000), torch.tensor([50.0])])
    found = Percentile().choose(histogram_of(x), UINT8_ASYMMETRIC)
    assert found.high == pytest.approx(1, abs=50 / 1024)


def test_where_all_that_is_not_0_would_be_cut_nothing_is() -> None:
    x = torch.zeros(400_000)
    x[5] = 3.0
    x[6] = 1.0
    found = Percentile().choose(histogram_of(x), UINT8_ASYMMETRIC)
    assert found.high == pytest.approx(3)


@pytest.mark.parametrize("percent", [0, -1, 100.1])
def test_a_percentage_is_one(percent: float) -> None:
    with pytest.raises(UsageError, match="more than 0 and at most 100"):
        Percentile(percent)
