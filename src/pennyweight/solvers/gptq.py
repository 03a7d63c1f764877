"""GPTQ: rounding that corrects, in the columns still to come, for the error already made.

Frantar et al., "GPTQ" (2022), in the form of LDLQ (Chee et al., "QuIP", 2023), which is the same algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pennyweight.schemes import Scheme
from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Need, Solution, Solver, Statistics
from pennyweight.solvers.rounding import Rounding, check_statistics


@dataclass(frozen=True)
class Gptq:
    """min over codes of tr(E H Eᵀ), E = W - Ŵ: the weight itself is the target of Rounding.

    Scales are fitted first (`fit`), weighted by importance. With `rounds` and `passes` at 0 they stay, and one pass of
    feedback is all: the paper's algorithm. Columns that calibration never lit are rounded to nearest. Where the
    damping had to be raised, or the weight was rounded to nearest because no damping helped, that is noted.
    """

    damping: float = 0.01
    block: int = 128
    fit: Fit = "search"
    rounds: int = 0
    passes: int = 0
    name: str = "gptq"
    needs: frozenset[Need] = frozenset({"hessian"})

    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics) -> Solution:
        """Raises ShapeError where `stats` has no Hessian [in, in]."""
        check_statistics(stats, self.needs, w.shape[1], self.name)
        rounding = Rounding(self.damping, self.block, self.fit, self.rounds, self.passes)
        return rounding.solve(w, scheme, stats)


PROVIDES: tuple[Solver, ...] = (Gptq(), Gptq(rounds=2, passes=2, name="gptq-refined"))
