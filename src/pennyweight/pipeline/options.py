"""What the user may ask of a run."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import get_args

from pennyweight.core.errors import UsageError
from pennyweight.core.registry import find
from pennyweight.models.text import BUILT_IN
from pennyweight.pipeline.chain import Chain
from pennyweight.schemes import parse_scheme
from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Solver


@dataclass(frozen=True)
class Options:
    """scheme        short name, see `parse_scheme`
    solver        name of a solver
    fit           how scales are fitted: "search" or "minmax"
    runtime       what will read the result
    calibration   text file, .jsonl, directory, "built-in", "none", or texts;
                  None: built-in where the solver needs data
    samples       windows at most
    length        tokens a window; the model's own limit where that is less
    seed          which windows are drawn
    device        torch device of the arithmetic
    """

    scheme: str = "int4-g128"
    solver: str = "gptq"
    fit: Fit = "search"
    runtime: str = "transformers"
    calibration: str | tuple[str, ...] | None = None
    samples: int = 128
    length: int = 512
    seed: int = 0
    device: str = "cpu"
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raises UsageError for what can be seen without the model."""
        parse_scheme(self.scheme)
        if self.fit not in get_args(Fit):
            raise UsageError(f"--fit {self.fit}: give {' or '.join(get_args(Fit))}")
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples}: give at least 1")
        if self.configured_solver.needs and self.calibration_source is None:
            raise UsageError(
                f"--solver {self.solver} needs calibration data: drop --calibration none, or use --solver nearest"
            )

    @property
    def configured_solver(self) -> Solver:
        """The solver with the fit of scales that was asked for, where it fits any; raises UsageError."""
        solver = find("solvers", self.solver)
        fits = is_dataclass(solver) and any(field.name == "fit" for field in fields(solver))
        configured: Solver = replace(solver, fit=self.fit) if fits else solver
        return configured

    @property
    def chain(self) -> Chain:
        """How codes will be chosen; raises UsageError."""
        return Chain(self.configured_solver, self.fit)

    @property
    def calibration_source(self) -> str | tuple[str, ...] | None:
        """The source of calibration text, or None for a data-free run."""
        if self.calibration is None:
            return BUILT_IN if self.configured_solver.needs else None
        return None if self.calibration == "none" else self.calibration
