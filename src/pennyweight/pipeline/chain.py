"""How the codes of a block are chosen: site by site, and then perhaps as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Solver
from pennyweight.solvers.learned.base import BlockSolver
from pennyweight.transforms.base import Rescaling


@dataclass(frozen=True)
class Chain:
    """transform   rewrites a block before it is solved; None: it stays as it is
    solver      chooses the codes of one site after the other
    fit         how scales are fitted where a site has to be rounded to nearest
    is_staged   each site sees what the quantized sites before it in the block give, not only the blocks before
    refine      chooses the codes of a block's sites together, from those; None: they stay
    seed        of whatever is drawn on the way
    """

    solver: Solver
    fit: Fit
    transform: Rescaling | None = None
    is_staged: bool = False
    refine: BlockSolver | None = None
    seed: int = 0

    @property
    def needs_original(self) -> bool:
        """The original model's own activations are asked for, beside those behind quantized blocks."""
        return "cross" in self.solver.needs or self.refine is not None
