"""`plan`: what each size would cost, and the plan that fits a budget, before any long run."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pennyweight.core.errors import UsageError
from pennyweight.core.files import to_json
from pennyweight.core.version import versions
from pennyweight.evaluate.judges import judge_of
from pennyweight.evaluate.loss_budget import Found, Trial, smallest_that_holds
from pennyweight.pipeline.costs.base import Tell as CostTell
from pennyweight.pipeline.costs.base import tell_nobody
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.measuring import measuring
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.planning import Problem, problem_of, within
from pennyweight.pipeline.prepare import drafted
from pennyweight.pipeline.record import arithmetic
from pennyweight.pipeline.run import quantize
from pennyweight.plan.frontier import Point
from pennyweight.plan.plan import Plan
from pennyweight.plan.plan_file import PlanEntries
from pennyweight.train.recovery.finish import Recovery

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
        of_budget = {"budget": str(self.draft.options.budget), "confidence": 0.95}
        return {**of_budget, **self.found.about, "trials": [trial.evidence for trial in self.found.trials]}

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
    """The plan for `options.budget`, and everything that it was chosen from. Changes nothing but what is kept of
    costs and trials.

    A budget of loss is kept by trial: plans are made in full in directories below `scratch` that go away, and judged.
    """
    with tempfile.TemporaryDirectory(prefix="pennyweight-source-") as described:
        draft = drafted(model, options, None, scratch=Path(described))
        return _planned(model, draft, options, scratch=scratch, tell=tell, tell_trial=tell_trial)


def _planned(
    model: str, draft: Draft, options: Options, *, scratch: Path | None, tell: CostTell, tell_trial: TellTrial
) -> Planned:
    budget = options.budget
    if budget is None or not budget.is_of_loss:
        problem = problem_of(draft, measuring(draft, tell))
        return Planned(draft, problem, None if budget is None else within(draft, problem, budget), None)
    if not draft.is_run:
        raise UsageError(f"{budget}: a loss is judged by running the model, and transformers does not run it")
    # Before anything is measured: what it is judged on may be of no use.
    judge = judge_of(draft, budget)
    problem = problem_of(draft, measuring(draft, tell))
    maker = _Maker(model, draft, options, problem)
    found = smallest_that_holds(draft, problem, judge, maker, scratch=scratch, tell=tell_trial)
    return Planned(draft, problem, problem.plan(problem.frontier.schemes(found.point)), found)


@dataclass(frozen=True)
class _Maker:
    """Makes plans of the frontier of `problem` as the run of `options` would."""

    model: str
    draft: Draft
    options: Options
    problem: Problem

    def key(self, point: Point) -> str:
        options = self._given(self.draft.options, point)
        job = replace(self.draft, options=options).job(self._plan(point))
        finish = Recovery.of(options)
        recipe = replace(job.recipe, finish=None if finish is None else finish.name)
        return hashlib.sha256((to_json(recipe) + to_json({**versions(), **arithmetic(job)})).encode()).hexdigest()[:32]

    def make(self, point: Point, out: Path) -> None:
        options = self._given(self.options, point)
        quantize(self.model, out, options, finish=Recovery.of(options))

    def _plan(self, point: Point) -> Plan:
        return self.problem.plan(self.problem.frontier.schemes(point))

    def _given(self, options: Options, point: Point) -> Options:
        return replace(options, budget=None, keep=(), at=(), plan=PlanEntries("a trial", self._plan(point).names))
