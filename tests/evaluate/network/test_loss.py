"""Budgets of accuracy: labelled samples with a bound, the user's function without one, and the search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pennyweight.core.errors import DataError, UsageError
from pennyweight.evaluate.confidence import paired_bound
from pennyweight.evaluate.network.loss import (
    FunctionJudge,
    Judged,
    LabelledJudge,
    NetworkTrial,
    smallest_that_holds,
)
from pennyweight.models.network import Batch
from pennyweight.models.network.network import Inputs
from pennyweight.plan.frontier import Point

CLASSES = 4


class Answers(nn.Module):
    """Gives the label that stands in its input, but for the first `wrong` samples of all."""

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        right = x[:, 1].long()
        right = torch.where(x[:, 0] < self.wrong, (right + 1) % CLASSES, right)
        return nn.functional.one_hot(right, CLASSES).float()


def batches(samples: int = 1000, size: int = 100) -> list[Batch]:
    labels = torch.arange(samples) % CLASSES
    x = torch.stack((torch.arange(samples).float(), labels.float()), 1)
    return [Batch(Inputs((a,)), b) for a, b in zip(x.split(size), labels.split(size), strict=True)]


def test_labelled_samples_give_points_and_a_bound() -> None:
    judge = LabelledJudge.of(Answers(), batches(), 2.0)
    assert judge.measure(Answers(7)) == Judged(pytest.approx(0.7), pytest.approx(100 * paired_bound(7, 0, 1000)))
    assert judge.measure(Answers()).loss == 0
    # Better than before is a negative loss.
    assert LabelledJudge.of(Answers(10), batches(), 2.0).measure(Answers()).loss == pytest.approx(-1.0)


def test_too_few_samples_cannot_show_a_small_loss() -> None:
    with pytest.raises(DataError, match="100 samples cannot show so little.*give 5,"):
        LabelledJudge.of(Answers(), batches(100), 0.1)


@pytest.mark.parametrize(
    "labels", [torch.zeros(100, 2, dtype=torch.long), torch.zeros(99, dtype=torch.long), torch.zeros(100)]
)
def test_labels_that_do_not_fit_are_told(labels: Tensor) -> None:
    bad = [Batch(batches(100)[0].inputs, labels)]
    with pytest.raises(DataError, match="batch 0 of evaluate: labels .* integer label a sample"):
        LabelledJudge.of(Answers(), bad, 50.0)


def test_a_function_is_taken_at_its_word() -> None:
    judge = FunctionJudge.of(Answers(), lambda module: torch.tensor(90.0 - module.wrong))
    assert judge.measure(Answers(3)) == Judged(3.0, 3.0)


@pytest.mark.parametrize(
    ("value", "told"), [(0.93, "per cent"), ("good", "number"), (float("nan"), "nan"), (None, "number")]
)
def test_a_function_that_gives_no_per_cent_is_told(value: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        FunctionJudge.of(Answers(), lambda module: value)


def points(count: int = 40) -> list[Point]:
    return [Point(1000 + 100 * index, 1.0 / (1 + index), ()) for index in range(count)]


def test_the_smallest_plan_that_holds_is_taken() -> None:
    made: list[Point] = []
    heard: list[NetworkTrial] = []

    class Known:
        about = "known"

        def measure(self, module: nn.Module) -> Judged:
            loss = 5 * made[-1].cost
            return Judged(loss, loss * 1.1)

    def make(point: Point) -> nn.Module:
        made.append(point)
        return nn.Identity()

    chosen = smallest_that_holds(points(), 0.5, Known(), make, tell=heard.append)
    expected = next(point for point in points() if 5.5 * point.cost <= 0.5)
    # The search stops within 1 % of the size.
    assert chosen.point.size_bytes <= expected.size_bytes * 1.05
    assert 5.5 * chosen.point.cost <= 0.5
    assert list(chosen.trials) == heard
    assert len(heard) <= 12
    assert any(not trial.holds for trial in heard)


def test_no_plan_that_holds_is_told_with_what_was_seen() -> None:
    class Bad:
        about = "top-1 accuracy on 7 labelled samples"

        def measure(self, module: nn.Module) -> Judged:
            return Judged(9.0, 11.0)

    with pytest.raises(
        UsageError, match=r"max_loss=1: even the largest .* loses 9 points, at most 11 \(top-1 accuracy on 7"
    ):
        smallest_that_holds(points(), 1.0, Bad(), lambda point: nn.Identity())
