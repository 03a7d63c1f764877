"""A budget of loss: the smallest plan of the frontier that is seen to lose no more, with the evidence for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pennyweight.core.errors import UsageError
from pennyweight.evaluate.judges import Judge
from pennyweight.evaluate.loss_search import Search
from pennyweight.evaluate.trials import KeptTrials, Measured
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.planning import Problem
from pennyweight.plan.frontier import Point


class Maker(Protocol):
    """Makes plans of the frontier."""

    def key(self, point: Point) -> str:
        """All that shapes the artefact of a plan."""
        ...

    def make(self, point: Point, out: Path) -> None:
        """Its artefact, in a new directory."""
        ...


@dataclass(frozen=True)
class Trial:
    """A plan that was made and looked at.

    loss, upper        what was lost, and its upper confidence bound, in the unit of the budget
    is_open            the loss is within the limit and its bound is not: with more to judge on it might hold
    original, metric   of a task: its metric before and after, in points
    resumed            it was made by an earlier run
    """

    size_bytes: int
    predicted: float
    loss: float
    upper: float
    holds: bool
    is_open: bool = False
    original: float | None = None
    metric: float | None = None
    resumed: bool = False

    @property
    def evidence(self) -> dict[str, Any]:
        """What the record says of it: the same, whoever made it."""
        known = asdict(self)
        del known["resumed"]
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class Found:
    """The plan that was taken, and why. about: what it was judged on, none of which it was calibrated on."""

    point: Point
    trials: tuple[Trial, ...]
    about: Mapping[str, Any]


def smallest_that_holds(
    draft: Draft,
    problem: Problem,
    judge: Judge,
    maker: Maker,
    *,
    scratch: Path | None = None,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """The smallest plan of the frontier whose loss, by `judge`, is at most the budget's with 95 % confidence.

    Trials are made in full, by `maker`, in directories below `scratch`, and what was measured of each is kept beside
    the model for the next run. Between two plans, one that holds and a smaller one that does not, the next is chosen
    where the predicted loss, scaled to what was measured beside it, meets the limit. Raises UsageError where not even
    the largest plan holds.
    """
    budget = draft.options.budget
    assert budget is not None
    points = [point for point in problem.frontier.points if any(scheme is not None for scheme in point.schemes)]
    trials = _Trials(draft.streamed, budget.value, judge, maker, scratch)
    search: Search[Trial] = Search(points, budget.value, scale=judge.scale)
    while (index := search.next()) is not None:
        search.add(index, trials.of(points[index]))
        tell(search.tried[index])
    best = search.best
    if best is None:
        largest = max(search.tried)
        worst = search.tried[largest]
        raise UsageError(
            f"{budget}: even the largest plan that was tried, {points[largest].size_bytes:,} bytes of tensors, loses "
            f"{worst.loss:.3g}, at most {worst.upper:.3g} with 95 % confidence on {judge.data}: allow more, or give "
            f"{judge.more(Measured(worst.loss, worst.upper), budget.value)}"
        )
    return Found(points[best], tuple(search.tried.values()), judge.about)


@dataclass(frozen=True)
class _Trials:
    original: StreamedModel
    limit: float
    judge: Judge
    maker: Maker
    scratch: Path | None

    def of(self, point: Point) -> Trial:
        kept, key = KeptTrials(self.original.path, self.judge.key), self.maker.key(point)
        known = kept.read().get(key)
        measured = known or self._measured(point)
        if known is None:
            kept.add(key, measured)
        holds = measured.upper <= self.limit
        is_open = measured.loss <= self.limit < measured.upper
        return Trial(point.size_bytes, point.cost, measured.loss, measured.upper, holds, is_open, measured.original,
                     measured.metric, resumed=known is not None)  # fmt: skip

    def _measured(self, point: Point) -> Measured:
        with tempfile.TemporaryDirectory(prefix=".pennyweight-trial-", dir=self.scratch) as directory:
            place = Path(directory) / "artefact"
            self.maker.make(point, place)
            trust, device = self.original.trust_remote_code, str(self.original.device)
            return self.judge.measure(StreamedModel(place, trust_remote_code=trust, device=device))
