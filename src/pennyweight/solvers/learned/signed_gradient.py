"""SignRound: codes and scales of a block learned by signed gradients.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (2023); AutoRound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.learned.base import BlockProblem, BlockSolution, BlockSolver
from pennyweight.solvers.learned.descent import descend
from pennyweight.solvers.learned.directions import Direction, Rule, direction, falling_rate
from pennyweight.solvers.learned.multipliers import Multipliers, applied
from pennyweight.solvers.learned.neighbours import Ladder


@dataclass(frozen=True)
class SignedGradient:
    """min over p, m of the mean of (block(Ŵ(p, m)) - target)², the gradient of rounding taken as 1 (straight through).

    Ŵ(p, m) decodes code_0 moved by round(p) rungs of its number format's ladder, with scales m * scale_0 (and offsets)
    rounded to their stored type. code_0 and scale_0 are those of the start, so that Ŵ is the start's weight at p = p_0,
    m = 1. With f in [-1/2, 1/2] where the original weight lies between code_0 and its neighbours (in the paper's words
    p = f + V), p_0 = lean * f. Where error feedback moved a weight away from its nearest value, f is at the edge of
    code_0's cell: with a `lean` of 1 the first step would undo half of what the feedback has done.

        p <- clamp(p - rate_t u(dL/dŴ * dŴ/dp), -1, 1)      rate_t = 2 reach / steps (1 - t / steps)
        m <- m - rate_t' u(dL/dm)                            the same with scale_reach

    so that `reach` is how far a parameter comes that is always sent the same way. u is `rule`: the sign, as in the
    paper, or `Moments`. dŴ/dp counts by its sign alone, which is that of the scale. The best codes seen are kept, the
    start's among them.
    """

    steps: int = 100
    batches: int = 4
    reach: float = 1.0
    scale_reach: float = 0.1
    lean: float = 0.4
    looks: int = 2
    rule: Rule = "moments"
    name: str = "signed-gradient"

    def with_steps(self, steps: int, *, batches: int) -> SignedGradient:
        return replace(self, steps=steps, batches=batches)

    def refine(self, problem: BlockProblem) -> BlockSolution:
        roundings = {name: Offsets.of(problem.weights[name], start, self) for name, start in problem.start.items()}
        return descend(problem, roundings, steps=self.steps, batches=self.batches, looks=self.looks)


@dataclass(frozen=True)
class Offsets:
    """p and m of one site; see SignedGradient.

    positions   p, float32 [out, in]
    rising      int8 [out, in]: the sign of dŴ/dp, 0 where the weight's scale is 0
    """

    solver: SignedGradient
    start: QuantizedWeight
    ladder: Ladder
    positions: Tensor
    rising: Tensor
    direction: Direction
    multipliers: list[Multipliers]

    @staticmethod
    def of(w: Tensor, start: QuantizedWeight, solver: SignedGradient) -> Offsets:
        ladder = Ladder.of(start.scheme.element, start.codes.device)
        below, above = ladder.beside(start)
        return Offsets(
            solver,
            start,
            ladder,
            between(w.float(), below, start.dequantize(), above).clamp_(-0.5, 0.5).mul_(solver.lean),
            (above - below).sign().to(torch.int8),
            direction(solver.rule, start.shape, start.codes.device),
            Multipliers.of(start, solver.rule) if solver.scale_reach else [],
        )

    def quantized(self) -> QuantizedWeight:
        moved = self.ladder.moved(self.start, self.positions.round().to(torch.int8))
        return applied(self.multipliers, moved)

    def weight(self) -> Tensor:
        return self.quantized().dequantize()

    def step_(self, gradient: Tensor, step: int, steps: int) -> None:
        rate = falling_rate(step, steps)
        weight = self.weight()
        for multipliers in self.multipliers:
            multipliers.step_(gradient, self.start, weight, step=step, rate=self.solver.scale_reach * rate)
        towards = self.direction.of(gradient * self.rising, step)
        self.positions.sub_(towards, alpha=self.solver.reach * rate).clamp_(-1, 1)


def between(w: Tensor, below: Tensor, at: Tensor, above: Tensor) -> Tensor:
    """Where `w` lies on the ladder, in rungs from `at`: 1 at `above`, -1 at `below`, linear between and beyond.

    At an end of the ladder, where `below` or `above` is `at`, the rung on the other side is taken; 0 for a scale of 0.
    """
    up, down = above - at, at - below
    up, down = torch.where(up == 0, down, up), torch.where(down == 0, up, down)
    rungs = (w - at) / up
    return torch.where(rungs < 0, (w - at) / down, rungs).nan_to_num_(0.0, 0.0, 0.0)


PROVIDES: tuple[BlockSolver, ...] = (SignedGradient(),)
