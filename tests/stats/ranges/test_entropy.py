"""Entropy: the fast divergence is that of the textbook's loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from pennyweight.formats.integer import Int
from pennyweight.schemes.activation import ActivationScheme
from pennyweight.stats.ranges.entropy import _SMOOTHING, Entropy, _divergence, _threshold
from pennyweight.stats.ranges.minmax import MinMax
from tests.stats.ranges.histograms import UINT8_ASYMMETRIC, histogram_of

# Sums of float64 in another order.
ROUNDING = 1e-9
SYMMETRIC = ActivationScheme(Int(8), is_symmetric=True)


def textbook(counts: Sequence[int], kept: int, levels: int) -> float:
    p = [float(c) for c in counts[:kept]]
    p[-1] += sum(counts[kept:])
    q = [0.0] * kept
    for level in range(levels):
        bins = [k for k in range(kept) if k * levels // kept == level]
        live = [k for k in bins if counts[k]]
        for k in live:
            q[k] = sum(counts[b] for b in bins) / len(live)
    if not sum(q):
        return math.inf
    p, q = ([v / sum(side) + _SMOOTHING for v in side] for side in (p, q))
    p, q = ([v / sum(side) for v in side] for side in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def random_counts(bins: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.rand(bins, generator=generator).mul(3000 / torch.arange(1, bins + 1)).long()
    counts[-1] = 1
    return counts.tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [4, 7, 16])
def test_the_divergence_is_the_textbooks(levels: int, seed: int) -> None:
    counts = random_counts(61, seed)
    for kept in range(levels, 62):
        expected = textbook(counts, kept, levels)
        assert _divergence(torch.tensor(counts).double(), kept, levels) == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_has_the_least_divergence_of_all(seed: int) -> None:
    counts = random_counts(200, seed)
    found = _threshold(torch.tensor(counts).double(), 16)
    tried = range(200, 15, -1)
    assert found == min(tried, key=lambda kept: textbook(counts, kept, 16))


def test_as_few_bins_as_levels_may_be_kept() -> None:
    counts = torch.zeros(200, dtype=torch.float64)
    counts[:16] = torch.tensor([1000, 100] * 8)
    counts[-1] = 1
    assert _threshold(counts, 16) == 16


@pytest.mark.parametrize(
    ("sign", "scheme", "levels"),
    [(1, UINT8_ASYMMETRIC, 256), (-1, UINT8_ASYMMETRIC, 256), (0, UINT8_ASYMMETRIC, 128), (1, SYMMETRIC, 128)],
)
def test_a_scheme_has_its_steps_where_the_numbers_are(sign: int, scheme: ActivationScheme, levels: int) -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).pow(3)
    histogram = histogram_of(x.abs() * sign if sign else x)
    ends = {one: _threshold(histogram.magnitudes.double(), one) * histogram.width for one in (64, 128, 256)}
    assert len(set(ends.values())) == 3
    low, high = max(histogram.low, -ends[levels]), min(histogram.high, ends[levels])
    assert Entropy().choose(histogram, scheme) == scheme.parameters(low, high)


def test_bins_that_hold_nothing_before_the_threshold_are_no_choice() -> None:
    counts = torch.zeros(100, dtype=torch.float64)
    counts[-1] = 5
    assert _divergence(counts, 50, 16) == math.inf
    assert _threshold(counts, 16) == 100


def test_no_more_bins_than_levels_keep_the_whole_range() -> None:
    histogram = histogram_of(torch.randn(5000), bins=256)
    assert Entropy().choose(histogram, SYMMETRIC) == MinMax().choose(histogram, SYMMETRIC)


def test_a_long_thin_tail_is_cut() -> None:
    x = torch.cat([torch.randn(100_000), torch.linspace(5, 40, 20)])
    histogram = histogram_of(x)
    whole = MinMax().choose(histogram, SYMMETRIC)
    assert Entropy().choose(histogram, SYMMETRIC).scale < 0.5 * whole.scale


def test_a_flat_distribution_keeps_its_range() -> None:
    x = torch.linspace(0, 1, 200_001)
    histogram = histogram_of(x)
    found = Entropy().choose(histogram, UINT8_ASYMMETRIC)
    assert found.high == pytest.approx(1, abs=0.02)
