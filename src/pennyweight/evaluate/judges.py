"""What a loss is judged on: windows of text, or the items of a task."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from pennyweight.core.errors import DataError, ModelError
from pennyweight.evaluate.compare import Reference, WindowScores, check_pair, mean_and_error
from pennyweight.evaluate.confidence import ERRORS
from pennyweight.evaluate.tasks.base import Outcome
from pennyweight.evaluate.tasks.exam import Exam
from pennyweight.evaluate.tasks.file import read_task
from pennyweight.evaluate.trials import Measured
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.windows import every_window
from pennyweight.plan.budget import Budget

# Below that many windows a standard error means little.
_LEAST_WINDOWS = 8


class Judge(Protocol):
    """Measures what a smaller model lost.

    key     its content: equal keys measure alike
    about   what the record says of it
    data    what it judges on, in words
    scale   the loss, in the unit of the budget, that is expected of a predicted loss of 1 before anything was measured
    """

    @property
    def key(self) -> str: ...
    @property
    def about(self) -> Mapping[str, Any]: ...
    @property
    def data(self) -> str: ...
    @property
    def scale(self) -> float: ...

    def measure(self, candidate: StreamedModel) -> Measured: ...

    def more(self, measured: Measured, limit: float) -> str:
        """What to give so that such a loss could be shown to be within the limit."""
        ...


def judge_of(draft: Draft, budget: Budget) -> Judge:
    """The judge of a budget of loss; raises DataError where there is too little to judge on, and ModelError where the
    model cannot be judged so."""
    if budget.kind == "max-points":
        return _judge_of_task(draft.streamed, budget)
    if not draft.model.is_decoder:
        kind = type(draft.streamed.module).__name__
        raise ModelError(
            f"{budget}: {kind} predicts no tokens, so it has neither KL nor perplexity: give a size, or --max-loss "
            "with a --task of sentence pairs"
        )
    return TextJudge(Reference(draft.streamed, unseen_windows(draft)), budget)


def unseen_windows(draft: Draft) -> list[Tensor]:
    """Windows of the calibration text that the run is not calibrated on."""
    windows = every_window(draft.streamed, draft.options)
    seen = {tuple(window.tolist()) for window in draft.windows or ()}
    kept = [window for window in windows if tuple(window.tolist()) not in seen]
    if len(kept) < _LEAST_WINDOWS:
        raise DataError(
            f"the calibration text has {len(windows)} windows of {len(windows[0])} tokens, of which {len(kept)} are "
            f"not calibrated on: a loss is judged on at least {_LEAST_WINDOWS}; give more text, or fewer --samples"
        )
    return kept


@dataclass(frozen=True)
class TextJudge:
    """KL or perplexity on windows of text."""

    original: Reference
    budget: Budget
    scale: float = 1.0

    @property
    def key(self) -> str:
        about = f"{self.budget.kind} {len(self._windows)} {ERRORS} {text.digest(self._windows)}"
        return hashlib.sha256(about.encode()).hexdigest()[:32]

    @property
    def about(self) -> Mapping[str, Any]:
        return {"windows": len(self._windows), "tokens": self._tokens}

    @property
    def data(self) -> str:
        return f"{self._tokens} tokens"

    def measure(self, candidate: StreamedModel) -> Measured:
        return Measured(*bounded(self.original.compare(candidate), self.budget))

    def more(self, measured: Measured, limit: float) -> str:
        return "more text"

    @property
    def _windows(self) -> Sequence[Tensor]:
        return self.original.windows

    @property
    def _tokens(self) -> int:
        return sum(map(len, self._windows))


def bounded(scores: Sequence[WindowScores], budget: Budget, *, errors: float = ERRORS) -> tuple[float, float]:
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


def _judge_of_task(original: StreamedModel, budget: Budget) -> TaskJudge:
    assert budget.task is not None
    task = read_task(budget.task)
    exam = Exam.of(task, original)
    count, needed = len(task.items), task.metric.items_needed(budget.value)
    if count < needed:
        raise DataError(
            f"{budget}: {count:,} items cannot show so little, not even of a plan that answers each as the original "
            f"does: give {needed:,} or more, or allow more"
        )
    return TaskJudge(original, exam)


@dataclass(frozen=True)
class TaskJudge:
    """The first metric of a task, on the same items before and after, in points."""

    original: StreamedModel
    exam: Exam
    scale: float = 100.0

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.exam.task.sha256} {self.exam.task.metric!r} {ERRORS}".encode()).hexdigest()[:32]

    @property
    def about(self) -> Mapping[str, Any]:
        task = self.exam.task
        return {"task": task.path.name, "task_sha256": task.sha256, "kind": task.metric.name, "items": len(task.items)}

    @property
    def data(self) -> str:
        return f"{len(self.exam.task.items):,} items"

    def measure(self, candidate: StreamedModel) -> Measured:
        check_pair(candidate, self.original)
        task, outcomes = self.exam.task, self.exam.outcomes(candidate)
        lost = task.metric.lost(task.items, self._before, outcomes)
        before, after = (next(iter(self.exam.metrics(one).values())) for one in (self._before, outcomes))
        return Measured(lost.points, lost.upper, before, after)

    def more(self, measured: Measured, limit: float) -> str:
        """A bound comes nearer with the root of the number of items."""
        if measured.loss >= limit:
            return "more items"
        times = ((measured.upper - measured.loss) / (limit - measured.loss)) ** 2
        return f"more items, about {math.ceil(times * len(self.exam.task.items)):,}"

    @cached_property
    def _before(self) -> list[Outcome]:
        return self.exam.outcomes(self.original)
