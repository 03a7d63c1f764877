"""AdaRound: which of two neighbours each weight goes to, learned through a rectified sigmoid.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020); the block's output as in Li et al.,
"BRECQ" (2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.learned.base import BlockProblem, BlockSolution, BlockSolver
from pennyweight.solvers.learned.descent import descend
from pennyweight.solvers.learned.directions import Direction, Rule, direction
from pennyweight.solvers.learned.neighbours import Ladder

# Of the paper: the sigmoid is stretched to (LOW, HIGH) and cut to [0, 1], so that it gets there.
_LOW, _HIGH = -0.1, 1.1
# h(-_END) = 0 and h(_END) = 1: sigmoid(-log 11) = 1 / 12.
_END = math.log(11.0)


@dataclass(frozen=True)
class Sigmoid:
    """min over v of the mean of (block(Ŵ(v)) - target)², v driven to where Ŵ has stored values only.

        Ŵ(v) = W_0 + h(v) (W_1 - W_0),   h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)

    W_0 decodes the start's codes, W_1 their neighbours on the side where the original weight lies; scales stay. At the
    start h = 0. After the `free` part of the steps a regulariser rises that pulls h to 0 or 1, whichever is nearer:

        v <- clamp(v - rate_t (u(dL/dv) - strength sign(2h - 1) |2h - 1|^(beta_t - 1)))
        rate_t = rate (1 - t / steps)

    the gradient of the paper's 1 - |2h - 1|^beta, with beta falling from 20 to 2, beside a direction u that does not
    depend on the size of the loss (`rule`). What is stored is h > 1/2; the best codes seen are kept, the start's among
    them.
    """

    steps: int = 200
    batches: int = 8
    rate: float = 0.1
    strength: float = 1.0
    free: float = 0.2
    looks: int = 4
    rule: Rule = "moments"
    name: str = "sigmoid"

    def refine(self, problem: BlockProblem) -> BlockSolution:
        roundings = {name: Relaxed.of(problem.weights[name], start, self) for name, start in problem.start.items()}
        return descend(problem, roundings, steps=self.steps, batches=self.batches, looks=self.looks)


@dataclass(frozen=True)
class Relaxed:
    """v of one site; see Sigmoid.

    logits   v, float32 [out, in]
    first    W_0
    change   W_1 - W_0
    other    the codes of W_1
    """

    solver: Sigmoid
    start: QuantizedWeight
    other: QuantizedWeight
    first: Tensor
    change: Tensor
    logits: Tensor
    direction: Direction

    @staticmethod
    def of(w: Tensor, start: QuantizedWeight, solver: Sigmoid) -> Relaxed:
        ladder = Ladder.of(start.scheme.element, start.codes.device)
        below, above = ladder.beside(start)
        first = start.dequantize()
        rising = (above - below).sign()
        other = ladder.moved(start, ((w.float() - first).sign() * rising).to(torch.int8))
        return Relaxed(
            solver,
            start,
            other,
            first,
            other.dequantize() - first,
            torch.full_like(first, -_END),
            direction(solver.rule, start.shape, start.codes.device),
        )

    def weight(self) -> Tensor:
        return torch.addcmul(self.first, _stretched(self.logits), self.change)

    def quantized(self) -> QuantizedWeight:
        codes = torch.where(self.logits > 0, self.other.codes, self.start.codes)
        return QuantizedWeight.of(codes, self.start.parameters, self.start.scheme)

    def step_(self, gradient: Tensor, step: int, steps: int) -> None:
        share = step / steps
        inner = self.logits.sigmoid()
        slope = inner.mul(1 - inner).mul_(_HIGH - _LOW)
        towards = self.direction.of(gradient * self.change * slope, step)
        if share >= self.solver.free:
            annealed = (share - self.solver.free) / (1 - self.solver.free)
            lean = _stretched(self.logits).mul_(2).sub_(1)
            beta = 2 + 18 * (1 - annealed)
            towards.sub_(lean.abs().pow_(beta - 1).mul_(lean.sign()), alpha=self.solver.strength)
        self.logits.sub_(towards, alpha=self.solver.rate * (1 - share)).clamp_(-_END, _END)


def _stretched(v: Tensor) -> Tensor:
    return v.sigmoid().mul_(_HIGH - _LOW).add_(_LOW).clamp_(0, 1)


PROVIDES: tuple[BlockSolver, ...] = (Sigmoid(),)
