"""The error seen on a histogram is that of the numbers, and the range is as good as that of a search over them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.core.errors import UsageError
from pennyweight.formats.integer import Int
from pennyweight.schemes.activation import UINT8, ActivationParameters, ActivationScheme
from pennyweight.stats.ranges.minmax import MinMax
from pennyweight.stats.ranges.mse import Mse
from pennyweight.stats.ranges.rounding_error import rounding_error
from tests.stats.ranges.histograms import SCHEMES, UINT8_ASYMMETRIC, gelu_like, histogram_of, squared_error

# The numbers of a bin are not spread evenly, and 20,000 of them are few for 1,000 bins. Those of a heavy distribution
# crowd around 0, in the inner halves of the two bins there.
SPREAD, HEAVY_SPREAD = 0.03, 0.2
# A search over numbers sees their noise: its range is a little better on them than any from a histogram.
NOISE = 1.01
DATA = {
    "normal": torch.randn(20_000, generator=torch.Generator().manual_seed(1)),
    "rectified": torch.randn(20_000, generator=torch.Generator().manual_seed(2)).relu(),
    "gelu": gelu_like(20_000),
    "negative": -torch.rand(20_000, generator=torch.Generator().manual_seed(3)).square() * 9 - 1,
    "heavy": torch.randn(20_000, generator=torch.Generator().manual_seed(4)).pow(3),
    "clipped": (3 * torch.randn(20_000, generator=torch.Generator().manual_seed(5)) + 3).clamp(0, 6),
}
every_data = pytest.mark.parametrize("name", list(DATA))
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: str(scheme.name))


def clipped(scheme: ActivationScheme, x: Tensor, low: float, high: float) -> ActivationParameters:
    return scheme.parameters(low * float(x.min()), high * float(x.max()))


def test_the_error_by_hand() -> None:
    # Steps of 1 from 0 to 3, two bins [0, 1) and [3, 4) of which the last ends at 3.5.
    histogram = histogram_of(torch.tensor([0.25, 0.5, 3.5, 0.0]), bins=4)
    parameters = ActivationParameters(1.0, 0, Int(2, signed=False))
    # Mean d² over [0, 1] is 1/12, over [3, 3.5] with d = t - 3 it is 1/12 too; mean |d| is 1/4 in both.
    assert rounding_error(histogram, [parameters]).tolist() == pytest.approx([3 / 4 / 12])
    assert rounding_error(histogram, [parameters], power=1).tolist() == pytest.approx([3 / 4 / 4])
    # With the steps from -3 to 0 all that is positive is clipped to 0.
    parameters = ActivationParameters(1.0, 3, Int(2, signed=False))
    assert rounding_error(histogram, [parameters], power=1).tolist() == pytest.approx([(2 * 0.5 + 3.25) / 4])


@every_data
@every_scheme
@pytest.mark.parametrize("power", [1.0, 2.0, 2.4])
def test_the_error_is_that_of_the_numbers(name: str, scheme: ActivationScheme, power: float) -> None:
    x = DATA[name]
    found = [clipped(scheme, x, share, other) for share in (1, 0.5, 0.2) for other in (1, 0.7, 0.1)]
    errors = rounding_error(histogram_of(x), found, power=power)
    spread = HEAVY_SPREAD if name == "heavy" else SPREAD
    assert errors.tolist() == pytest.approx([squared_error(x, one, power) for one in found], rel=spread)


@every_data
@pytest.mark.parametrize("scheme", SCHEMES[::3] + SCHEMES[6:7], ids=lambda scheme: str(scheme.name))
def test_the_range_is_as_good_as_that_of_a_search_over_the_numbers(name: str, scheme: ActivationScheme) -> None:
    x = DATA[name]
    shares = torch.linspace(0.05, 1, 20).tolist()
    is_two_sided = bool(x.min() < 0 < x.max())
    pairs = [(one, other) for one in shares for other in (shares if is_two_sided else [one])]
    best = min(squared_error(x, clipped(scheme, x, *pair)) for pair in pairs)
    found = Mse().choose(histogram_of(x), scheme)
    assert squared_error(x, found) <= NOISE * best


def test_two_bits_of_a_uniform_distribution_by_hand() -> None:
    # Numbers spread over [0, 1] and read as 0, s, 2s and 3s have the least error at s = 2/7: the last step then reaches
    # half a step beyond 6/7.
    x = torch.linspace(0, 1, 100_001)
    found = Mse().choose(histogram_of(x), ActivationScheme(Int(2, signed=False)))
    assert found.zero == 0
    assert found.scale == pytest.approx(2 / 7, rel=0.01)


def test_a_higher_power_clips_less() -> None:
    histogram = histogram_of(DATA["normal"])
    scales = [Mse(p).choose(histogram, ActivationScheme(Int(4), is_symmetric=True)).scale for p in (1.0, 2.0, 4.0)]
    assert scales == sorted(scales)
    assert scales[0] < scales[2]


def test_one_outlier_that_costs_less_clipped_is_clipped() -> None:
    x = torch.cat([DATA["normal"], torch.tensor([60.0])])
    found = Mse().choose(histogram_of(x), ActivationScheme(Int(4, signed=False)))
    assert found.high < 20
    assert squared_error(x, found) < squared_error(x, MinMax().choose(histogram_of(x), ActivationScheme(Int(4))))


@pytest.mark.parametrize("sign", [1, -1])
def test_an_outlier_on_one_side_leaves_the_other_side_alone(sign: int) -> None:
    x = sign * torch.cat([DATA["rectified"], torch.tensor([-60.0])])
    scheme = ActivationScheme(Int(4, signed=False))
    pairs = [(one / 60, other) for one in range(0, 61, 2) for other in torch.linspace(0.4, 1, 13).tolist()]
    best = min(squared_error(x, clipped(scheme, x, *pair[::sign])) for pair in pairs)
    found = Mse().choose(histogram_of(x), scheme)
    assert squared_error(x, found) <= NOISE * best


def test_numbers_that_steps_meet_exactly_keep_their_range() -> None:
    x = torch.arange(256).float()
    found = Mse().choose(histogram_of(x), UINT8_ASYMMETRIC)
    assert found == ActivationParameters(1.0, 0, UINT8)


@pytest.mark.parametrize("p", [0.0, -1.0, 100.0, float("nan")])
def test_the_power_is_positive(p: float) -> None:
    with pytest.raises(UsageError, match="an error of power"):
        Mse(p)
