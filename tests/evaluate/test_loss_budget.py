"""The search for the smallest plan that holds, and what a trial is judged by."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.evaluate.compare import WindowScores
from pennyweight.evaluate.judges import bounded
from pennyweight.evaluate.loss_budget import Trial, _Search
from pennyweight.plan.budget import Budget
from pennyweight.plan.frontier import Point


def _searched(points: list[Point], true: list[float], limit: float) -> tuple[int | None, int]:
    """What the search takes where the plan `index` loses true[index], and how many trials that takes."""
    search = _Search(points, limit)
    while (index := search.next()) is not None:
        assert index not in search.tried
        loss = true[index]
        search.add(index, Trial(points[index].size_bytes, points[index].cost, loss, loss, loss <= limit))
    return search.best, len(search.tried)


@given(
    count=st.integers(2, 200),
    factor=st.floats(0.05, 20),
    bend=st.floats(0.5, 2),
    place=st.floats(-0.1, 1.2),
)
def test_the_smallest_plan_that_holds_is_found_to_a_hundredth(
    count: int, factor: float, bend: float, place: float
) -> None:
    points = [Point(int(10**6 * 1.01**index), 2.0 * 0.93**index, ()) for index in range(count)]
    true = [factor * point.cost**bend for point in points]
    limit = true[0] * (true[-1] / true[0]) ** place if place < 1 else true[-1] / 2
    first = next((index for index, loss in enumerate(true) if loss <= limit), None)
    found, trials = _searched(points, true, limit)
    assert trials <= 12
    if first is None:
        assert found is None
        return
    assert found is not None
    assert true[found] <= limit
    assert points[found].size_bytes <= 1.0101 * points[first].size_bytes


def test_predictions_that_are_right_need_few_trials() -> None:
    points = [Point(int(10**6 * 1.01**index), 0.5 * 0.95**index, ()) for index in range(150)]
    _, trials = _searched(points, [0.4 * point.cost for point in points], 0.01)
    assert trials <= 4


def _scores(kl: list[float], more: list[float]) -> list[WindowScores]:
    return [
        WindowScores(tokens=10, nats=10 * (3 + extra), reference_nats=30.0, kl=10 * divergence)
        for divergence, extra in zip(kl, more, strict=True)
    ]


def test_a_loss_is_the_mean_and_its_bound_is_above_it_by_the_standard_errors() -> None:
    scores = _scores([0.01, 0.03], [0.02, 0.04])
    mean, upper = bounded(scores, Budget("max-kl", 0.1))
    assert mean == pytest.approx(0.02)
    assert upper == pytest.approx(0.02 + 2.33 * 0.01)
    mean, upper = bounded(scores, Budget("max-loss", 0.1))
    assert mean == pytest.approx(math.expm1(0.03))
    assert upper == pytest.approx(math.expm1(0.03 + 2.33 * 0.01))
