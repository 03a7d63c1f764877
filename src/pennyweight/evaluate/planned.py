"""`plan`: what each size would cost, and the plan that fits a budget, before any long run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pennyweight.core.errors import UsageError
from pennyweight.evaluate.loss_budget import Found, Trial, smallest_that_holds
from pennyweight.pipeline.costs.base import Tell as CostTell
from pennyweight.pipeline.costs.base import tell_nobody
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.measuring import measuring
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.planning import Problem, problem_of, within
from pennyweight.pipeline.prepare import drafted
from pennyweight.pipeline.run import quantize
from pennyweight.plan.frontier import Point
from pennyweight.plan.plan import Plan
from pennyweight.plan.plan_file import PlanEntries
from pennyweight.train.finish import Recovery

TellTrial = Callable[[Trial], None]


@dataclass(frozen=True)
class Planned:
    """plan: the one that fits the budget, None where none was given. found: of a budget of loss, how it was chosen."""

    draft: Draft
    problem: Problem
    plan: Plan | None
    found: Found | None

    @property
    def evidence(self) -> dict[str, Any]:
        """What a budget of loss was judged by, for the record."""
        if self.found is None:
            return {}
        trials = [asdict(trial) for trial in self.found.trials]
        of_budget = {"budget": str(self.draft.options.budget), "confidence": 0.95}
        return {**of_budget, "windows": self.found.windows, "tokens": self.found.tokens, "trials": trials}

    @property
    def entries(self) -> PlanEntries:
        """The plan, to be given to a run."""
        assert self.plan is not None
        return PlanEntries(f"of {self.draft.options.budget}", self.plan.names)


def planned(
    model: str,
    options: Options,
    *,
    scratch: Path | None = None,
    tell: CostTell = tell_nobody,
    tell_trial: TellTrial = lambda trial: None,
) -> Planned:
    """The plan for `options.budget`, and everything that it was chosen from. Changes nothing but the cache of costs.

    A budget of loss is kept by trial: plans are made in full in directories below `scratch` that go away, and judged.
    """
    with tempfile.TemporaryDirectory(prefix="pennyweight-source-") as described:
        draft = drafted(model, options, None, scratch=Path(described))
        return _planned(model, draft, options, scratch=scratch, tell=tell, tell_trial=tell_trial)


def _planned(
    model: str, draft: Draft, options: Options, *, scratch: Path | None, tell: CostTell, tell_trial: TellTrial
) -> Planned:
    if options.budget is not None and options.budget.is_of_loss and not draft.is_run:
        raise UsageError(f"{options.budget}: a loss is judged by running the model, and transformers does not run it")
    problem = problem_of(draft, measuring(draft, tell))
    if options.budget is None:
        return Planned(draft, problem, None, None)
    if not options.budget.is_of_loss:
        return Planned(draft, problem, within(draft, problem, options.budget), None)

    def make(point: Point, out: Path) -> None:
        entries = PlanEntries("a trial", problem.plan(problem.frontier.schemes(point)).names)
        trial = replace(options, budget=None, keep=(), at=(), plan=entries)
        quantize(model, out, trial, finish=Recovery.of(trial))

    found = smallest_that_holds(draft, problem, make, scratch=scratch, tell=tell_trial)
    return Planned(draft, problem, problem.plan(problem.frontier.schemes(found.point)), found)
