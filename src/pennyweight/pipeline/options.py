"""What the user may ask of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_args

from pennyweight.core.errors import UsageError
from pennyweight.core.registry import find
from pennyweight.models.text import BUILT_IN
from pennyweight.pipeline.chain import Chain
from pennyweight.pipeline.effort import Effort, Steps, steps_of
from pennyweight.plan.budget import Budget
from pennyweight.plan.overrides import parse_overrides
from pennyweight.plan.plan_file import PlanEntries, PlanName
from pennyweight.schemes import parse_scheme
from pennyweight.schemes.fit import Fit

NONE = "none"


@dataclass(frozen=True)
class Options:
    """scheme        short name, see `parse_scheme`: of every site, where there is neither a budget nor a plan
    bits          in place of a scheme: what the container does best in so many; without both, what it does best
    budget        what the result may take or lose: chooses the scheme of each site
    plan          the scheme of each site, chosen before, or the name of a plan that the container knows
    keep, at      globs of sites that stay in float; GLOB=SCHEME for sites that get no other
    effort        what the run may cost: decides whatever of the next five is None
    rotate        whether the residual stream is rotated first, which changes nothing but how well it rounds
    transform     name of a transform of each block before it is solved, or "none"
    solver        name of a solver
    staged        whether each site is calibrated behind the quantized ones before it in its block
    refine        name of a solver of whole blocks that goes on from there, or "none"
    recover       whether scales and norms are trained end to end at last
    recover_epochs  passes of that training over its windows
    loss_aware    whether tokens weigh more in calibration where the model's loss depends more on a site's output
    fit           how scales are fitted: "search" or "minmax"
    runtime       what will read the result
    calibration   text file, .jsonl, directory, "built-in", "self" (the model writes it), "none", or texts;
                  None: built-in unless the solver that was asked for needs no data
    importance    file of an importance matrix of llama.cpp, in place of calibration
    samples       windows at most; an encoder gets texts by themselves, as many as these windows would hold
    length        tokens a window, at most; the model's own limit where that is less
    seed          which windows are drawn, and the order in which training sees them
    device        torch device of the arithmetic
    """

    scheme: str | None = None
    bits: int | None = None
    budget: Budget | None = None
    plan: PlanEntries | PlanName | None = None
    keep: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    effort: Effort = "normal"
    rotate: bool = False
    transform: str | None = None
    solver: str | None = None
    staged: bool | None = None
    refine: str | None = None
    recover: bool | None = None
    recover_epochs: float = 3.0
    loss_aware: bool = False
    fit: Fit = "search"
    runtime: str = "transformers"
    calibration: str | tuple[str, ...] | None = None
    importance: str | None = None
    samples: int = 128
    length: int = 512
    seed: int = 0
    device: str = "cpu"
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raises UsageError for what can be seen without the model."""
        if self.scheme is not None and self.bits is not None:
            raise UsageError(f"--scheme {self.scheme} and --bits {self.bits} exclude each other: give one")
        if self.scheme is not None:
            parse_scheme(self.scheme)
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise UsageError(f"--bits {self.bits}: give 2 to 8")
        if self.budget is not None and self.plan is not None:
            raise UsageError(f"{self.budget} and the plan {self.plan.source} exclude each other: give one")
        if isinstance(self.plan, PlanEntries) and (self.keep or self.at):
            raise UsageError(f"the plan {self.plan.source} decides every site: edit it in place of --keep and --at")
        parse_overrides(self.keep, self.at)
        if self.fit not in get_args(Fit):
            raise UsageError(f"--fit {self.fit}: give {' or '.join(get_args(Fit))}")
        if self.effort not in get_args(Effort):
            raise UsageError(f"--effort {self.effort}: give {', '.join(get_args(Effort))}")
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples}: give at least 1")
        if not 0 < self.recover_epochs < math.inf:
            raise UsageError(f"--recover-epochs {self.recover_epochs}: give more than 0")
        if self.importance is not None and self.calibration not in (None, NONE):
            raise UsageError(f"--importance {self.importance} stands in place of --calibration: give one of them")
        if self.importance is not None and self.fit != "search":
            raise UsageError(f"--importance {self.importance} is used by --fit search: leave out --fit {self.fit}")
        self._check_blind()

    def _check_blind(self) -> None:
        """Raises UsageError for what needs calibration data where there is none."""
        solver = self.chain.solver
        if self.calibration_source is not None:
            return
        if solver.needs:
            way = "--calibration none" if self.importance is None else "--importance"
            raise UsageError(f"--solver {self.solver} needs calibration data: drop {way}, or use --solver nearest")
        steps = self.steps
        for option, is_asked in (
            (f"--transform {steps.transform}", steps.transform != NONE),
            (f"--refine {steps.refine}", steps.refine != NONE),
            ("--recover", steps.recover),
            ("--loss-aware", self.loss_aware),
        ):
            if is_asked:
                raise UsageError(f"{option} needs calibration data: give --calibration FILE or built-in")

    @property
    def is_planned(self) -> bool:
        """Sites may have different schemes."""
        return bool(self.budget or self.plan or self.keep or self.at)

    @property
    def steps(self) -> Steps:
        """What was asked for by name, and for the rest what the effort does."""
        steps = steps_of(self.effort, has_data=self.calibration_source is not None)
        if self.solver is not None:
            # A solver asked for by name is what the user wants to see, and nothing after it.
            steps = Steps(self.solver)
        asked: dict[str, Any] = {
            "transform": self.transform, "staged": self.staged, "refine": self.refine, "recover": self.recover
        }  # fmt: skip
        return replace(steps, **{name: value for name, value in asked.items() if value is not None})

    @property
    def chain(self) -> Chain:
        """How codes are chosen; raises UsageError for a name that is not known."""
        steps = self.steps
        return Chain(
            solver=with_field(find("solvers", steps.solver), "fit", self.fit),
            fit=self.fit,
            transform=None if steps.transform == NONE else find("transforms", steps.transform),
            is_staged=steps.staged,
            refine=None if steps.refine == NONE else find("solvers.learned", steps.refine),
            seed=self.seed,
        )

    @property
    def calibration_source(self) -> str | tuple[str, ...] | None:
        """The source of calibration text, or None for a run without any."""
        if self.importance is not None:
            return None
        if self.calibration is not None:
            return None if self.calibration == NONE else self.calibration
        is_trained = any(step not in (None, NONE, False) for step in (self.transform, self.refine, self.recover))
        is_blind = self.solver is not None and not find("solvers", self.solver).needs
        return None if is_blind and not is_trained else BUILT_IN


def with_field(thing: Any, name: str, value: object) -> Any:
    """`thing` with its field `name` set, where it has one."""
    has_field = is_dataclass(thing) and any(field.name == name for field in fields(thing))
    return replace(thing, **{name: value}) if has_field else thing
