"""A budget of accuracy: the smallest plan of the frontier that is seen to lose no more points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pennyweight.core.errors import DataError, UsageError
from pennyweight.evaluate.loss_search import Search
from pennyweight.evaluate.onnx.bounds import outputs_of
from pennyweight.evaluate.tasks.accuracy import accuracy_items, accuracy_lost
from pennyweight.evaluate.tasks.base import Outcome
from pennyweight.models.network import Batch
from pennyweight.plan.frontier import Point


@dataclass(frozen=True)
class NetworkTrial:
    """A plan that was made and looked at.

    predicted  by the planner, in its own unit
    loss       points lost; upper: at most, with 95 % confidence where single samples were compared, else `loss` itself
    """

    size_bytes: int
    predicted: float
    loss: float
    upper: float
    holds: bool


@dataclass(frozen=True)
class Judged:
    """Points of accuracy that a module lost, and at most."""

    loss: float
    upper: float


class NetworkJudge(Protocol):
    """Measures what a module lost; `about` is what it judges on, in words."""

    @property
    def about(self) -> str: ...

    def measure(self, module: nn.Module) -> Judged: ...


@dataclass(frozen=True)
class LabelledJudge:
    """Top-1 accuracy on the same labelled samples before and after, with the score bound of paired proportions."""

    batches: Sequence[Batch]
    before: Sequence[Outcome]

    @staticmethod
    def of(module: nn.Module, batches: Sequence[Batch], limit: float) -> LabelledJudge:
        """`module` is the float network; raises DataError where labels do not fit, and where the samples are too few to
        show that no more than `limit` points are lost."""
        before = _outcomes(module, batches)
        needed = accuracy_items(limit)
        if len(before) < needed:
            raise DataError(
                f"max_loss={limit:g}: {len(before):,} samples cannot show so little, not even of a network that "
                f"answers each as before: give {needed:,} or more, or allow more"
            )
        return LabelledJudge(batches, before)

    @property
    def about(self) -> str:
        return f"top-1 accuracy on {len(self.before):,} labelled samples"

    def measure(self, module: nn.Module) -> Judged:
        lost = accuracy_lost(self.before, _outcomes(module, self.batches))
        return Judged(lost.points, lost.upper)


def _outcomes(module: nn.Module, batches: Sequence[Batch]) -> list[Outcome]:
    """1 for each sample whose largest output is its label, else 0."""
    found: list[Outcome] = []
    with torch.no_grad():
        for place, batch in enumerate(batches):
            scores, labels = outputs_of(module, batch.inputs)[0], torch.as_tensor(batch.labels)
            if scores.dim() != 2 or labels.shape != scores.shape[:1] or labels.is_floating_point():
                raise DataError(
                    f"batch {place} of evaluate: labels {list(labels.shape)} {labels.dtype} beside outputs "
                    f"{list(scores.shape)}: accuracy needs outputs [samples, classes] and an integer label a sample; "
                    "for anything else give a function evaluate(module) that returns per cent"
                )
            found += [(float(right),) for right in (scores.argmax(1) == labels).tolist()]
    return found


@dataclass(frozen=True)
class FunctionJudge:
    """What a function of the user's own says: accuracy in per cent, higher is better; no bound comes with it."""

    function: Callable[[Any], Any]
    before: float

    @staticmethod
    def of(module: nn.Module, function: Callable[[Any], Any]) -> FunctionJudge:
        """Raises DataError where the function does not give per cent."""
        before = _per_cent(function(module))
        if 0 < before <= 1:
            raise DataError(
                f"evaluate gives {before:.4g} for the float network: give per cent (0 to 100), the unit of max_loss"
            )
        return FunctionJudge(function, before)

    @property
    def about(self) -> str:
        return "evaluate(module), without a confidence bound"

    def measure(self, module: nn.Module) -> Judged:
        lost = self.before - _per_cent(self.function(module))
        return Judged(lost, lost)


def _per_cent(value: Any) -> float:
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"evaluate gives {type(value).__name__}: return accuracy in per cent, a number") from error
    if not math.isfinite(number):
        raise DataError(f"evaluate gives {number}: return accuracy in per cent, a finite number")
    return number


@dataclass(frozen=True)
class Chosen:
    """The plan that was taken."""

    point: Point
    trials: tuple[NetworkTrial, ...] = field(default=())


def smallest_that_holds(
    points: Sequence[Point],
    limit: float,
    judge: NetworkJudge,
    make: Callable[[Point], nn.Module],
    *,
    tell: Callable[[NetworkTrial], None] = lambda trial: None,
) -> Chosen:
    """The smallest of `points`, from small to large, of which `judge` says that it loses at most `limit` points.

    `make` gives the module of a plan. Between a plan that holds and a smaller one that does not, the next is tried
    where the predicted loss, scaled to what was measured beside it, meets the limit. Raises UsageError where none does.
    """
    search: Search[NetworkTrial] = Search(points, limit)
    while (index := search.next()) is not None:
        point = points[index]
        judged = judge.measure(make(point))
        trial = NetworkTrial(point.size_bytes, point.cost, judged.loss, judged.upper, judged.upper <= limit)
        search.add(index, trial)
        tell(trial)
    if search.best is None:
        worst = search.tried[max(search.tried)]
        raise UsageError(
            f"max_loss={limit:g}: even the largest plan that was tried, {worst.size_bytes:,} bytes, loses "
            f"{worst.loss:.3g} points, at most {worst.upper:.3g} ({judge.about}): allow more, keep sites in float "
            "(keep=), give more effort, or more samples to judge on"
        )
    return Chosen(points[search.best], tuple(search.tried.values()))
