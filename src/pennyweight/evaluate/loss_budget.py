"""A budget of loss: the smallest plan of the frontier that is seen to lose no more, with the evidence for it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.core.errors import DataError, ModelError, UsageError
from pennyweight.evaluate.compare import WindowScores, compare, mean_and_error
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.planning import Problem
from pennyweight.pipeline.windows import every_window
from pennyweight.plan.budget import Budget
from pennyweight.plan.frontier import Point

# One-sided bound of 99 %. Of several trials on the same text the one that is taken is one that looked good, and whoever
# checks it has a sample too: with both, about 95 % are left.
_ERRORS = 2.33
# Below that many windows a standard error means little.
_LEAST_WINDOWS = 8
# The search ends where the next smaller plan that was not tried is this much smaller at most.
_CLOSE = 0.01
_TRIALS = 12

# Makes the artefact of a plan in a new directory.
Make = Callable[[Point, Path], None]


@dataclass(frozen=True)
class Trial:
    """A plan that was made and looked at. loss: in the unit of the budget; upper: its upper confidence bound."""

    size_bytes: int
    predicted: float
    loss: float
    upper: float
    holds: bool


@dataclass(frozen=True)
class Found:
    """The plan that was taken, and why. tokens: that it was judged on, none of which it was calibrated on."""

    point: Point
    trials: tuple[Trial, ...]
    windows: int
    tokens: int


def smallest_that_holds(
    draft: Draft,
    problem: Problem,
    make: Make,
    *,
    scratch: Path | None = None,
    tell: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """The smallest plan of the frontier whose loss, measured on windows that it was not calibrated on, is at most the
    budget's with 95 % confidence.

    Trials are made in full, by `make`, in directories below `scratch`. Between two plans, one that holds and a smaller
    one that does not, the next is chosen where the predicted loss, scaled to what was measured beside it, meets the
    limit. Raises DataError where there is too little text to judge on, UsageError where not even the largest plan
    holds.
    """
    budget = draft.options.budget
    assert budget is not None
    if not draft.model.is_decoder:
        kind = type(draft.streamed.module).__name__
        raise ModelError(f"{budget}: {kind} predicts no tokens, so it has neither KL nor perplexity: give a size")
    windows = unseen_windows(draft)
    points = [point for point in problem.frontier.points if any(scheme is not None for scheme in point.schemes)]
    judge = _Judge(draft, budget, windows, make, scratch, tell)
    search = _Search(points, budget.value)
    while (index := search.next()) is not None:
        search.add(index, judge.trial(points[index]))
    best = search.best
    if best is None:
        largest = max(search.tried)
        worst = search.tried[largest]
        raise UsageError(
            f"{budget}: even the largest plan that was tried, {points[largest].size_bytes:,} bytes of tensors, loses "
            f"{worst.loss:.3g}, at most {worst.upper:.3g} with 95 % confidence on {windows.numel()} tokens: "
            "allow more, or give more text"
        )
    return Found(points[best], tuple(search.tried.values()), windows.shape[0], windows.numel())


def unseen_windows(draft: Draft) -> Tensor:
    """Windows of the calibration text that the run is not calibrated on."""
    windows = every_window(draft.streamed, draft.options)
    seen = set() if draft.windows is None else {tuple(window) for window in draft.windows.tolist()}
    kept = [index for index, window in enumerate(windows.tolist()) if tuple(window) not in seen]
    if len(kept) < _LEAST_WINDOWS:
        raise DataError(
            f"the calibration text has {len(windows)} windows of {windows.shape[1]} tokens, of which {len(kept)} are "
            f"not calibrated on: a loss is judged on at least {_LEAST_WINDOWS}; give more text, or fewer --samples"
        )
    return windows[torch.tensor(kept)]


@dataclass(frozen=True)
class _Judge:
    draft: Draft
    budget: Budget
    windows: Tensor
    make: Make
    scratch: Path | None
    tell: Callable[[Trial], None]

    def trial(self, point: Point) -> Trial:
        with tempfile.TemporaryDirectory(prefix=".pennyweight-trial-", dir=self.scratch) as directory:
            place = Path(directory) / "artefact"
            self.make(point, place)
            trust = self.draft.options.trust_remote_code
            candidate = StreamedModel(place, trust_remote_code=trust, device=self.draft.options.device)
            scores = compare(candidate, self.draft.streamed, self.windows)
        loss, upper = bounded(scores, self.budget)
        trial = Trial(point.size_bytes, point.cost, loss, upper, upper <= self.budget.value)
        self.tell(trial)
        return trial


def bounded(scores: Sequence[WindowScores], budget: Budget, *, errors: float = _ERRORS) -> tuple[float, float]:
    """The loss that `budget` limits, and its upper confidence bound, so many standard errors above, from windows of
    equal length.

    Mean KL, or exp(d) - 1 for d the mean over windows of the difference in nats a token: the relative rise of
    perplexity.
    """
    if budget.kind == "max-kl":
        mean, error = mean_and_error([score.kl / score.tokens for score in scores])
        return mean, mean + errors * error
    mean, error = mean_and_error([(score.nats - score.reference_nats) / score.tokens for score in scores])
    return math.expm1(mean), math.expm1(mean + errors * error)


class _Search:
    """Which of `points`, from small to large, is looked at next."""

    def __init__(self, points: Sequence[Point], limit: float) -> None:
        self.points, self.limit = points, limit
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
        return min(max(wanted, self._low + 1), self._high - 1)

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
            return self.points[index].cost
        shares = [1 / (1 + distance) for distance, _ in near]
        log = sum(share * factor for share, (_, factor) in zip(shares, near, strict=True)) / sum(shares)
        return self.points[index].cost * math.exp(log)
