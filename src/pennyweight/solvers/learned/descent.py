"""Descent on the error of a block's output: what all learned rounding has in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pennyweight.core.parallel import allowed_threads, chunks, one_thread_per_operation, parallel_map
from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.learned.base import BlockProblem, BlockSolution


class Rounding(Protocol):
    """What is trained of one site."""

    def weight(self) -> Tensor:
        """The weight that the block computes with now, float32 [out, in]."""

    def step_(self, gradient: Tensor, step: int, steps: int) -> None:
        """Step `step`, from 0, of `steps` against the `gradient` [out, in] of the loss with respect to `weight()`."""

    def quantized(self) -> QuantizedWeight:
        """What would be stored now."""


def descend(
    problem: BlockProblem, roundings: Mapping[str, Rounding], *, steps: int, batches: int, looks: int
) -> BlockSolution:
    """Train `roundings` for `steps` steps of `batches` batches each, and keep the best codes seen.

    The codes are judged on all batches before the first step and `looks` times after it, evenly spaced, last after the
    last step; those with the lowest error are returned, with equal error the earlier ones.
    """
    with one_thread_per_operation(), torch.no_grad():
        best = dict(problem.start)
        if not best or not problem.targets:
            return BlockSolution(best, 0.0, 0.0, ("learned rounding had no site or no data: nothing was learned",))
        before = lowest = block_error(problem, best)
        looking = {steps * look // looks for look in range(1, looks + 1)}
        for step, drawn in enumerate(drawn_batches(len(problem.targets), batches, steps, problem.seed)):
            _step_(problem, roundings, drawn, step, steps)
            if step + 1 in looking:
                found = {name: rounding.quantized() for name, rounding in roundings.items()}
                error = block_error(problem, found)
                if error < lowest:
                    best, lowest = found, error
            problem.tell(step + 1, steps)
    is_start = lowest == before and steps > 0
    notes = ("learned rounding did not lower the block's error: the codes are those it started from",)
    return BlockSolution(best, before, lowest, notes if is_start else ())


def block_error(problem: BlockProblem, weights: Mapping[str, QuantizedWeight]) -> float:
    """mean over all batches of weight_c (output - target)², c the output channel."""
    decoded = {name: weight.dequantize() for name, weight in weights.items()}

    def one(batch: int) -> float:
        return float(_squares(problem, problem.forward(decoded, batch), batch).double())

    elements = sum(target.numel() for target in problem.targets)
    return sum(parallel_map(one, range(len(problem.targets)))) / elements


def drawn_batches(count: int, batches: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` lists of `batches` batch numbers: random orders of all `count` one after the other, cut in pieces."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < batches:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:batches]
        del waiting[:batches]


def gradients(
    problem: BlockProblem, weights: Mapping[str, Tensor], batches: Sequence[int], step: int = 0
) -> list[Tensor]:
    """The gradient of the summed squares of `batches` in `step` with respect to each of `weights`, float32 [out, in].

    One thread a batch; batches are added in order, as many at a time as there are threads, so that no more gradients
    than these are held.
    """

    def one(batch: int) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            run = problem.learning
            out = problem.forward(leaves, batch) if run is None else run(leaves, batch, step)
            loss = _squares(problem, out, batch)
            return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    total: list[Tensor] = [torch.zeros_like(weight) for weight in weights.values()]
    for together in chunks(len(batches), allowed_threads()):
        for found in parallel_map(one, batches[together]):
            for sums, part in zip(total, found, strict=True):
                sums.add_(part)
    return total


def _squares(problem: BlockProblem, out: Tensor, batch: int) -> Tensor:
    squares = (out.float() - problem.targets[batch].float()).square()
    return (squares if problem.output_weight is None else squares * problem.output_weight).sum()


def _step_(
    problem: BlockProblem, roundings: Mapping[str, Rounding], drawn: Sequence[int], step: int, steps: int
) -> None:
    weights = {name: rounding.weight() for name, rounding in roundings.items()}
    found = gradients(problem, weights, drawn, step)
    sites = list(zip(roundings.values(), found, strict=True))
    parallel_map(lambda site: site[0].step_(site[1], step, steps), sites)
