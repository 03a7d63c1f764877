"""A budget of loss: the smallest plan of the frontier that is seen to lose no more, with the evidence for it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pennyweight.core.errors import UsageError
from pennyweight.evaluate.judges import Judge
from pennyweight.evaluate.trials import KeptTrials, Measured
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.planning import Problem
from pennyweight.plan.frontier import Point

# The search ends where the next smaller plan that was not tried is this much smaller at most.
_CLOSE = 0.01
_TRIALS = 12


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
    original, metric   of a task: its metric before and after, in points
    resumed            it was made by an earlier run
    """

    size_bytes: int
    predicted: float
    loss: float
    upper: float
    holds: bool
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
    search = _Search(points, budget.value, scale=judge.scale)
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
        return Trial(point.size_bytes, point.cost, measured.loss, measured.upper, holds, measured.original,
                     measured.metric, resumed=known is not None)  # fmt: skip

    def _measured(self, point: Point) -> Measured:
        with tempfile.TemporaryDirectory(prefix=".pennyweight-trial-", dir=self.scratch) as directory:
            place = Path(directory) / "artefact"
            self.maker.make(point, place)
            trust, device = self.original.trust_remote_code, str(self.original.device)
            return self.judge.measure(StreamedModel(place, trust_remote_code=trust, device=device))


class _Search:
    """Which of `points`, from small to large, is looked at next."""

    def __init__(self, points: Sequence[Point], limit: float, *, scale: float = 1.0) -> None:
        """scale: the loss that is expected of a predicted one of 1 as long as nothing was measured."""
        self.points, self.limit, self.scale = points, limit, scale
        self.tried: dict[int, Trial] = {}
        # Those below do not hold, those from `_high` on do.
        self._low, self._high = -1, len(points)

    @property
    def best(self) -> int | None:
        return self._high if self._high < len(self.points) else None

    def add(self, index: int, trial: Trial) -> None:
        self.tried[index] = trial
        if trial.holds:
            self._high = min(self._high, index)
        else:
            self._low = max(self._low, index)

    def next(self) -> int | None:
        """None where the search has ended."""
        if self._high - self._low <= 1 or len(self.tried) >= _TRIALS:
            return None
        if self._is_close():
            return None
        last = len(self.points) - 1
        wanted = next((index for index in range(last + 1) if self._expected(index) <= self.limit), last)
        return min(max(self._hastened(wanted), self._low + 1), self._high - 1)

    def _hastened(self, wanted: int) -> int:
        """Where three trials on end went the same way, at least twice as far as the last step: what is expected may
        come nearer to the limit without end, as of a bound that no cost brings down to 0."""
        if len(self.tried) < 3:
            return wanted
        *_, (_, one), (before, two), (after, three) = self.tried.items()
        if not one.holds == two.holds == three.holds:
            return wanted
        far = after + 2 * (after - before)
        return min(wanted, far) if three.holds else max(wanted, far)

    def _is_close(self) -> bool:
        if self.best is None:
            return False
        below = self.points[self._low + 1].size_bytes
        return self.points[self._high].size_bytes <= (1 + _CLOSE) * below

    def _expected(self, index: int) -> float:
        """The upper bound that is to be expected: predicted loss, times what was measured over what was predicted at
        the nearest trials on both sides, with logarithms between them."""
        factors = [
            (abs(index - other), math.log(trial.upper / trial.predicted))
            for other, trial in self.tried.items()
            if trial.predicted > 0 and trial.upper > 0
        ]
        near = sorted(factors)[:2]
        if not near:
            return self.scale * self.points[index].cost
        shares = [1 / (1 + distance) for distance, _ in near]
        log = sum(share * factor for share, (_, factor) in zip(shares, near, strict=True)) / sum(shares)
        return self.points[index].cost * math.exp(log)
