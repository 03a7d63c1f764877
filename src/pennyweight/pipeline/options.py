"""What the user may ask of a run."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.models.text import BUILT_IN
from pennyweight.schemes.fit import Fit


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

    def calibration_source(self, *, needs_hessian: bool) -> str | tuple[str, ...] | None:
        """The source of calibration text, or None for a data-free run."""
        if self.calibration is None:
            return BUILT_IN if needs_hessian else None
        return None if self.calibration == "none" else self.calibration
