"""How the codes of a block are chosen: site by site, and then perhaps as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Solver
from pennyweight.solvers.learned.base import BlockSolver


@dataclass(frozen=True)
class Chain:
    """solver   chooses the codes of one site after the other
    fit      how scales are fitted where a site has to be rounded to nearest
    refine   chooses the codes of a block's sites together, from those; None: they stay
    """

    solver: Solver
    fit: Fit
    refine: BlockSolver | None = None

    @property
    def needs_original(self) -> bool:
        """The original model's own activations are asked for, beside those behind quantized blocks."""
        return "cross" in self.solver.needs or self.refine is not None
