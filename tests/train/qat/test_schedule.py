"""How rates and factors change over a training."""

from __future__ import annotations

import math

import pytest

from pennyweight.train.qat.options import FitOptions
from pennyweight.train.qat.schedule import Schedule


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine_to_zero() -> None:
    schedule = Schedule(FitOptions(warm_up=0.1), 100)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == pytest.approx([(1 + math.cos(math.pi * step / 90)) / 2 for step in range(91)])


def test_without_a_warm_up_it_starts_at_the_top() -> None:
    assert Schedule(FitOptions(warm_up=0.0), 10).rate(0) == 1


def test_norms_stand_still_in_exactly_the_last_share() -> None:
    schedule = Schedule(FitOptions(frozen_norms=0.3), 10)
    assert [schedule.is_norm_frozen(step) for step in range(10)] == [False] * 7 + [True] * 3
    assert not Schedule(FitOptions(frozen_norms=0.0), 10).is_norm_frozen(9)


def test_dampening_rises_from_nothing_and_the_threshold_of_freezing_falls() -> None:
    schedule = Schedule(FitOptions(dampening=0.1, freezing=(0.04, 0.01)), 100)
    assert [schedule.dampening(step) for step in (0, 50, 100)] == pytest.approx([0, 0.05, 0.1])
    assert [schedule.freeze_above(step) for step in (0, 50, 100)] == pytest.approx([0.04, 0.025, 0.01])
    assert Schedule(FitOptions(), 100).freeze_above(50) is None


@pytest.mark.parametrize(("bits", "share"), [(2, 0.25), (3, 0.5), (4, 1.0), (8, 1.0)])
def test_the_fewer_the_bits_the_less_weights_decay(bits: int, share: float) -> None:
    assert FitOptions().decay_at(bits) == pytest.approx(1e-4 * share)
    assert FitOptions(decay=0.3).decay_at(bits) == 0.3


def test_by_default_norms_stand_still_only_while_the_rate_is_low() -> None:
    """With frozen statistics and a high rate networks of 8 bits collapsed."""
    schedule = Schedule(FitOptions(), 1000)
    first = next(step for step in range(1000) if schedule.is_norm_frozen(step))
    assert 0 < schedule.rate(first) < 0.05
