"""What a range becomes: scales and zero points by hand, and data that is read exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.schemes.activation import UINT8, ActivationScheme
from pennyweight.stats.ranges.base import parameters_for
from pennyweight.stats.ranges.minmax import MinMax
from pennyweight.stats.ranges.moving_average import MovingAverage
from tests.stats.ranges.histograms import SCHEMES, UINT8_ASYMMETRIC, histogram_of

every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: str(scheme.name))


def test_the_whole_range_by_hand() -> None:
    found = MinMax().choose(histogram_of(torch.tensor([-1.0, 0.25, 4.1])), UINT8_ASYMMETRIC)
    assert (found.scale, found.zero) == (float(torch.tensor(5.1 / 255)), 50)
    found = MinMax().choose(histogram_of(torch.tensor([3.0, 5.1])), UINT8_ASYMMETRIC)
    assert (found.scale, found.zero) == (float(torch.tensor(5.1 / 255)), 0)
    found = MinMax().choose(histogram_of(torch.tensor([-5.1, -3.0])), UINT8_ASYMMETRIC)
    assert (found.scale, found.zero) == (float(torch.tensor(5.1 / 255)), 255)
    symmetric = ActivationScheme(UINT8, is_symmetric=True)
    found = MinMax().choose(histogram_of(torch.tensor([-1.0, 2.54])), symmetric)
    assert (found.scale, found.zero) == (float(torch.tensor(0.02)), 128)


def test_the_moving_average_by_hand() -> None:
    histogram = histogram_of(torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 11.0]), torch.tensor([-1.0, 1.0]))
    found = MovingAverage().choose(histogram, UINT8_ASYMMETRIC)
    low, high = -0.99 - 0.01 * 0.01, 1.1 - 0.01 * 0.1
    assert found.scale == pytest.approx((high - low) / 255, rel=1e-6)


@every_scheme
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(5),
        torch.tensor([0.3]),
        torch.full((4,), -7.7),
        torch.tensor([0.0, 0.1, 0.1]),
        torch.tensor([0.0, -123.4]),
        torch.tensor([0.7, -0.7, 0.0]),
        torch.tensor([2.0**100]),
        torch.tensor([2.0**126, -(2.0**126)]),
    ],
    ids=lambda x: str(x.tolist()),
)
def test_numbers_of_one_magnitude_are_read_exactly(x: Tensor, scheme: ActivationScheme) -> None:
    found = MinMax().choose(histogram_of(x), scheme)
    assert torch.equal(found.round_trip(x), x)


@every_scheme
def test_the_largest_floats_are_read_as_finite_ones(scheme: ActivationScheme) -> None:
    largest = torch.finfo(torch.float32).max
    for x in (torch.tensor([largest, -1.0]), torch.tensor([-largest, largest, 1.0]), torch.tensor([-largest])):
        found = MinMax().choose(histogram_of(x), scheme)
        decoded = found.round_trip(torch.linspace(-1, 1, 999).double().mul(largest).float())
        assert bool(decoded.isfinite().all())
        assert found.scale > 0


@every_scheme
@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-37])
def test_the_smallest_floats_do_not_make_a_division_overflow(value: float, scheme: ActivationScheme) -> None:
    found = MinMax().choose(histogram_of(torch.tensor([value, -value / 2, value / 3])), scheme)
    assert found.scale >= torch.finfo(torch.float32).tiny
    assert bool((torch.tensor([value]) / torch.tensor(found.scale)).isfinite())


def test_a_range_that_has_shrunk_to_0_becomes_the_whole_one() -> None:
    histogram = histogram_of(torch.tensor([0.0, 0.0, 1.0, 2.0]))
    assert parameters_for(histogram, UINT8_ASYMMETRIC, low=0.0, high=0.0) == MinMax().choose(
        histogram, UINT8_ASYMMETRIC
    )
