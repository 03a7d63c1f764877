"""SignRound: codes and scales of a block learned by signed gradients.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (2023); AutoRound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.learned.base import BlockProblem, BlockSolution, BlockSolver
from pennyweight.solvers.learned.descent import descend
from pennyweight.solvers.learned.directions import Direction, Rule, direction
from pennyweight.solvers.learned.multipliers import Multipliers
from pennyweight.solvers.learned.neighbours import Ladder


@dataclass(frozen=True)
class SignedGradient:
    """min over p, m of the mean of (block(Ŵ(p, m)) - target)², the gradient of rounding taken as 1 (straight through).

    Ŵ(p, m) decodes code_0 moved by round(p) rungs of its number format's ladder, with scales m * scale_0 (and offsets)
    rounded to their stored type. code_0 and scale_0 are those of the start, so that Ŵ is the start's weight at
    p = round(p_0), m = 1. p_0 is where the original weight lies between code_0 and its neighbours, at most `inset` from
    code_0: in the paper's words p = W/s - code_0 + V. A weight that the start moved away from its nearest value lies
    beyond the edge of code_0's cell; it begins inside, or the first step would undo what error feedback has done.

        p <- clamp(p - rate_t * u(dL/dŴ * dŴ/dp), -1, 1)       rate_t = rate (1 - t / steps)
        m <- m - scale_rate_t * u(dL/dm)

    u is `rule`: the sign, as in the paper, or `Moments`. dŴ/dp counts by its sign alone, which is that of the scale.
    The best codes seen are kept, the start's among them.
    """

    steps: int = 200
    batches: int = 8
    rate: float = 0.005
    scale_rate: float = 0.001
    inset: float = 0.4
    looks: int = 4
    rule: Rule = "sign"
    name: str = "signed-gradient"

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
            between(w.float(), below, start.dequantize(), above).clamp_(-solver.inset, solver.inset),
            (above - below).sign().to(torch.int8),
            direction(solver.rule, start.shape, start.codes.device),
            Multipliers.of(start, solver.rule) if solver.scale_rate else [],
        )

    def quantized(self) -> QuantizedWeight:
        weight = self.ladder.moved(self.start, self.positions.round().to(torch.int8))
        for multipliers in self.multipliers:
            weight = multipliers.applied(weight)
        return weight

    def weight(self) -> Tensor:
        return self.quantized().dequantize()

    def step_(self, gradient: Tensor, step: int, steps: int) -> None:
        share = 1 - step / steps
        now = self.quantized()
        for multipliers in self.multipliers:
            multipliers.step_(gradient, now, now.dequantize(), step=step, rate=self.solver.scale_rate * share)
        towards = self.direction.of(gradient * self.rising, step)
        self.positions.sub_(towards, alpha=self.solver.rate * share).clamp_(-1, 1)


def between(w: Tensor, below: Tensor, at: Tensor, above: Tensor) -> Tensor:
    """Where `w` lies on the ladder, in rungs from `at`: 1 at `above`, -1 at `below`, linear between and beyond.

    At an end of the ladder, where `below` or `above` is `at`, the rung on the other side is taken; 0 for a scale of 0.
    """
    up, down = above - at, at - below
    up, down = torch.where(up == 0, down, up), torch.where(down == 0, up, down)
    rungs = (w - at) / up
    return torch.where(rungs < 0, (w - at) / down, rungs).nan_to_num_(0.0, 0.0, 0.0)


PROVIDES: tuple[BlockSolver, ...] = (SignedGradient(),)
