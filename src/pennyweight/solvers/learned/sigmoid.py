"""AdaRound: which of two neighbours each weight goes to, learned through a rectified sigmoid.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020); the block's output as in Li et al.,
"BRECQ" (2021).
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

# Of the paper: the sigmoid is stretched to (LOW, HIGH) and cut to [0, 1], so that it gets there.
_LOW, _HIGH = -0.1, 1.1
# Beyond log 11, where h reaches its ends: h(-_END) = 0 and h(_END) = 1 exactly.
_END = 2.4


@dataclass(frozen=True)
class Sigmoid:
    """min over v, m of the mean of (block(Ŵ(v, m)) - target)², v driven to where Ŵ has stored values only.

        Ŵ(v, m) = W_0 + h(v) (W_1 - W_0),   h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1)

    W_0 decodes the start's codes, W_1 their neighbours on the side where the original weight lies, both with scales
    m * scale_0 (and offsets) rounded to their stored type. At the start h = 0 and m = 1. After the `free` part of the
    steps a regulariser rises that pulls h to 0 or 1, whichever is nearer:

        v <- clamp(v - rate_t u(dL/dv) + strength / steps sign(2h - 1) |2h - 1|^(beta_t - 1))
        m <- m - rate_t' u(dL/dm)

    the gradient of the paper's 1 - |2h - 1|^beta, with beta falling from 20 to 2, beside a direction u (`rule`) that
    does not depend on the size of the loss; it does not fade with the rate, or codes would be left undecided. dL/dv
    takes W_1 - W_0 by its sign alone. rate_t = 2 reach / steps (1 - t / steps), so that `reach` is how far a parameter
    comes that is always sent the same way, and rate_t' the same with `scale_reach`. What is stored is h > 1/2; the best
    codes seen are kept, the start's among them.
    """

    steps: int = 100
    batches: int = 4
    reach: float = 14.0
    scale_reach: float = 0.1
    strength: float = 112.0
    free: float = 0.2
    # Before the last step some codes are still undecided.
    looks: int = 1
    rule: Rule = "moments"
    name: str = "sigmoid"

    def with_steps(self, steps: int, *, batches: int) -> Sigmoid:
        return replace(self, steps=steps, batches=batches)

    def refine(self, problem: BlockProblem) -> BlockSolution:
        roundings = {name: Relaxed.of(problem.weights[name], start, self) for name, start in problem.start.items()}
        return descend(problem, roundings, steps=self.steps, batches=self.batches, looks=self.looks)


@dataclass(frozen=True)
class Relaxed:
    """v and m of one site; see Sigmoid.

    other    the codes of W_1
    rising   int8 [out, in]: the sign of W_1 - W_0
    logits   v, float32 [out, in]
    """

    solver: Sigmoid
    start: QuantizedWeight
    other: QuantizedWeight
    rising: Tensor
    logits: Tensor
    direction: Direction
    multipliers: list[Multipliers]

    @staticmethod
    def of(w: Tensor, start: QuantizedWeight, solver: Sigmoid) -> Relaxed:
        ladder = Ladder.of(start.scheme.element, start.codes.device)
        below, above = ladder.beside(start)
        first = start.dequantize()
        other = ladder.moved(start, ((w.float() - first).sign() * (above - below).sign()).to(torch.int8))
        return Relaxed(
            solver,
            start,
            other,
            (other.dequantize() - first).sign().to(torch.int8),
            torch.full_like(first, -_END),
            direction(solver.rule, start.shape, start.codes.device),
            Multipliers.of(start, solver.rule) if solver.scale_reach else [],
        )

    def weight(self) -> Tensor:
        first, other = (applied(self.multipliers, weight).dequantize() for weight in (self.start, self.other))
        return first.lerp_(other, _stretched(self.logits))

    def quantized(self) -> QuantizedWeight:
        codes = torch.where(self.logits > 0, self.other.codes, self.start.codes)
        return applied(self.multipliers, QuantizedWeight.of(codes, self.start.parameters, self.start.scheme))

    def step_(self, gradient: Tensor, step: int, steps: int) -> None:
        rate = falling_rate(step, steps)
        weight = self.weight()
        for multipliers in self.multipliers:
            multipliers.step_(gradient, self.start, weight, step=step, rate=self.solver.scale_reach * rate)
        inner = self.logits.sigmoid()
        slope = inner.mul(1 - inner).mul_(_HIGH - _LOW)
        towards = self.direction.of(slope.mul_(gradient).mul_(self.rising), step)
        towards.mul_(self.solver.reach * rate)
        if step >= self.solver.free * steps:
            towards.sub_(self._lean(step / steps), alpha=self.solver.strength / steps)
        self.logits.sub_(towards).clamp_(-_END, _END)

    def _lean(self, progress: float) -> Tensor:
        """sign(2h - 1) |2h - 1|^(beta_t - 1)."""
        annealed = (progress - self.solver.free) / (1 - self.solver.free)
        side = _stretched(self.logits).mul_(2).sub_(1)
        return side.abs().pow_(1 + 18 * (1 - annealed)).mul_(side.sign())


def _stretched(v: Tensor) -> Tensor:
    return v.sigmoid().mul_(_HIGH - _LOW).add_(_LOW).clamp_(0, 1)


PROVIDES: tuple[BlockSolver, ...] = (Sigmoid(),)
