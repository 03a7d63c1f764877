"""What every chooser of ranges that is provided must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.errors import DataError, UsageError
from pennyweight.core.registry import provided
from pennyweight.formats.integer import Int
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.base import RangeChooser
from pennyweight.stats.ranges.rounding_error import rounding_error

CHOOSERS = list(provided("stats.ranges").values())
SCHEMES = [
    ActivationScheme(Int(bits, signed=signed), is_symmetric=symmetric)
    for bits in (8, 4, 2)
    for signed in (False, True)
    for symmetric in (False, True)
]
# Sums of float64 in another order.
ROUNDING = 1e-12
TINY = torch.finfo(torch.float32).tiny
every_chooser = pytest.mark.parametrize("chooser", CHOOSERS, ids=lambda found: str(found.name))
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: str(scheme.name))
numbers = st.one_of(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40),
    st.lists(st.floats(0, 6, width=32), min_size=1, max_size=40),
)
OUTLIER = torch.cat([torch.linspace(-2, 2, 3001), torch.tensor([1e30])])
HOSTILE: dict[str, Tensor] = {
    "zeros": torch.zeros(9),
    "one element": torch.tensor([-3.3]),
    "constant": torch.full((99,), 0.7),
    "mask": torch.tensor([0.0, 1.0] * 50),
    "1e-38": torch.tensor([1e-38, 0.5e-38, -1e-38]),
    "1e30": 1e30 * torch.linspace(-1, 0.3, 500),
    "one outlier": OUTLIER,
    "all negative": -torch.linspace(1, 2, 500),
    "all positive": torch.linspace(5, 6, 500),
    "cauchy": torch.randn(5000, generator=torch.Generator().manual_seed(0)).reciprocal(),
    "whole float32": torch.tensor([-3.4e38, 3.4e38, 1.0, -1e-45]),
    "not contiguous": torch.randn(40, 60, generator=torch.Generator().manual_seed(1))[::2, ::3].T,
    "bfloat16": torch.randn(2000, generator=torch.Generator().manual_seed(2)).bfloat16(),
}


def histogram_of(*parts: Tensor) -> Histogram:
    found = Histogram.zero()
    for part in parts:
        found = found.update(part)
    return found


def checked(found: ActivationParameters, scheme: ActivationScheme, x: Tensor) -> None:
    assert found.element == scheme.element
    assert found.scale == float(torch.tensor(found.scale)) >= TINY
    assert isinstance(found.zero, int)
    assert scheme.element.smallest <= found.zero <= scheme.element.largest
    if scheme.is_symmetric:
        assert found.zero == (0 if scheme.element.signed else 2 ** (scheme.element.bits - 1))
    every_value = torch.arange(scheme.element.smallest, scheme.element.largest + 1).sub(found.zero).mul(found.scale)
    decoded = found.round_trip(torch.cat([x.flatten().float(), every_value, torch.zeros(1)]))
    assert bool(decoded.isfinite().all())
    assert float(decoded[-1]) == 0
    assert torch.equal(found.round_trip(decoded), decoded)


@every_chooser
@settings(max_examples=60, deadline=None)
@given(values=numbers, scheme=st.sampled_from(SCHEMES))
def test_any_finite_tensor_gives_valid_parameters(
    chooser: RangeChooser, values: list[float], scheme: ActivationScheme
) -> None:
    x = torch.tensor(values)
    checked(chooser.choose(histogram_of(x), scheme), scheme, x)


@every_chooser
@every_scheme
@pytest.mark.parametrize("x", list(HOSTILE.values()), ids=list(HOSTILE))
def test_hostile_tensors_are_no_trouble(chooser: RangeChooser, scheme: ActivationScheme, x: Tensor) -> None:
    checked(chooser.choose(histogram_of(x), scheme), scheme, x)


@every_chooser
@every_scheme
@pytest.mark.parametrize("name", ["zeros", "one element", "constant", "mask"])
def test_numbers_of_one_magnitude_are_read_exactly(chooser: RangeChooser, scheme: ActivationScheme, name: str) -> None:
    x = HOSTILE[name]
    assert torch.equal(chooser.choose(histogram_of(x), scheme).round_trip(x), x)


@settings(max_examples=60, deadline=None)
@given(values=numbers, scheme=st.sampled_from(SCHEMES))
def test_mse_is_never_worse_than_minmax_on_the_histogram(values: list[float], scheme: ActivationScheme) -> None:
    histogram = histogram_of(torch.tensor(values))
    both = [provided("stats.ranges")[name].choose(histogram, scheme) for name in ("mse", "minmax")]
    least, whole = rounding_error(histogram, both).tolist()
    assert least <= whole * (1 + ROUNDING)


@every_chooser
@every_scheme
def test_parts_merges_threads_and_calls_change_nothing(chooser: RangeChooser, scheme: ActivationScheme) -> None:
    parts = torch.randn(6000, generator=torch.Generator().manual_seed(3)).pow(3).split(1000)
    before = torch.get_num_threads()
    found: list[Any] = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(chooser.choose(histogram_of(*parts), scheme))
    finally:
        torch.set_num_threads(before)
    if chooser.name != "moving-average":
        found.append(chooser.choose(histogram_of(torch.cat(parts[::-1])), scheme))
        found.append(chooser.choose(histogram_of(*parts[4:]).merge(histogram_of(*parts[:4])), scheme))
    assert set(found) == {found[0]}


@every_chooser
def test_a_histogram_is_not_edited(chooser: RangeChooser) -> None:
    histogram = histogram_of(torch.randn(3000))
    kept = histogram.counts.clone()
    for scheme in SCHEMES:
        chooser.choose(histogram, scheme)
    assert torch.equal(histogram.counts, kept)


@every_chooser
def test_without_numbers_there_is_no_range(chooser: RangeChooser) -> None:
    for empty in (Histogram.zero(), histogram_of(torch.empty(0, 3))):
        with pytest.raises(DataError, match="no numbers have been seen"):
            chooser.choose(empty, SCHEMES[0])


@every_chooser
def test_a_dynamic_scheme_has_no_static_range(chooser: RangeChooser) -> None:
    with pytest.raises(UsageError, match="uint8-dynamic takes its ranges from each tensor"):
        chooser.choose(histogram_of(torch.randn(9)), ActivationScheme(is_dynamic=True))


def test_all_choosers_are_found() -> None:
    assert set(provided("stats.ranges")) >= {"minmax", "moving-average", "percentile", "mse", "entropy"}
