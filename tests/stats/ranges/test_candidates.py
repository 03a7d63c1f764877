"""Candidates and the choice by a consumer's error."""

from __future__ import annotations

import math

import pytest
import torch

from pennyweight.core.errors import DataError, UsageError
from pennyweight.core.registry import provided
from pennyweight.formats.integer import Int
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.candidates import candidates, choose_by
from tests.stats.ranges.histograms import SCHEMES, UINT8_ASYMMETRIC, gelu_like, histogram_of, squared_error


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: str(scheme.name))
def test_candidates_are_distinct_and_hold_every_choice(scheme: ActivationScheme) -> None:
    histogram = histogram_of(gelu_like(20_000), 2 * gelu_like(20_000, seed=1))
    found = candidates(histogram, scheme)
    assert len(found) == len(set(found)) >= 8
    assert set(found) >= {chooser.choose(histogram, scheme) for chooser in provided("stats.ranges").values()}
    assert found[0] == provided("stats.ranges")["minmax"].choose(histogram, scheme)


def test_data_that_is_read_exactly_has_one_candidate() -> None:
    assert len(candidates(histogram_of(torch.tensor([0.0, 0.3])), UINT8_ASYMMETRIC)) == 1
    assert len(candidates(histogram_of(torch.zeros(3)), UINT8_ASYMMETRIC)) == 1


def test_the_range_is_chosen_by_the_consumers_error() -> None:
    # The consumer's only wide weight reads the channel of large numbers: clipping them costs it more than it costs the
    # mean over all numbers.
    x = torch.randn(4000, 16)
    x[:, 0] *= 8
    weight = torch.full((4, 16), 0.01)
    weight[:, 0] = 1
    scheme = ActivationScheme(Int(4, signed=False))
    histogram = histogram_of(x)

    def error(parameters: ActivationParameters) -> float:
        return float(((parameters.round_trip(x) - x) @ weight.T).square().mean())

    found = choose_by(histogram, scheme, error)
    least = provided("stats.ranges")["mse"].choose(histogram, scheme)
    assert error(found) == min(error(one) for one in candidates(histogram, scheme))
    assert error(found) < error(least)
    assert squared_error(x, found) > squared_error(x, least)


def test_errors_that_are_not_finite_are_passed_over() -> None:
    histogram = histogram_of(torch.randn(100))
    tried = candidates(histogram, UINT8_ASYMMETRIC)
    assert choose_by(histogram, UINT8_ASYMMETRIC, lambda one: 1.0 if one == tried[3] else math.nan) == tried[3]
    assert choose_by(histogram, UINT8_ASYMMETRIC, lambda one: 1.0) == tried[0]
    with pytest.raises(DataError, match=r"none of \d+ ranges has a finite error"):
        choose_by(histogram, UINT8_ASYMMETRIC, lambda one: math.nan)


def test_without_data_or_for_a_dynamic_scheme_there_are_none() -> None:
    with pytest.raises(DataError, match="no numbers have been seen"):
        candidates(Histogram.zero(), UINT8_ASYMMETRIC)
    with pytest.raises(UsageError, match="uint8-dynamic takes its ranges from each tensor"):
        candidates(histogram_of(torch.randn(5)), ActivationScheme(is_dynamic=True))
