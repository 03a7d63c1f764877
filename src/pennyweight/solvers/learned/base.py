"""What a solver of a whole block is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pennyweight.schemes import QuantizedWeight

# Weights by site name, and the number of a batch -> the block's output [windows, tokens, width], differentiable.
Forward = Callable[[Mapping[str, Tensor], int], Tensor]
# The same with the number of the step that is taken, from 0.
SteppedForward = Callable[[Mapping[str, Tensor], int, int], Tensor]
# How many steps are done, and of how many.
Tell = Callable[[int, int], None]


def tell_nobody(done: int, total: int) -> None:
    """For callers that do not follow the steps."""


@dataclass(frozen=True)
class BlockProblem:
    """A block whose sites are to be rounded together so that its output stays.

    weights        site -> the original weight, float32 [out, in]
    start          site -> its codes so far, of a solver that looks at one site at a time; sites left out keep the
                   block's own weights
    forward        runs the block with the given weights in place of its own on a batch of calibration inputs, those
                   that the quantized blocks before it give; called from several threads at once
    targets        batch -> the output of the original block in the original model, [windows, tokens, width]
    output_weight  [width], or None for ones: what the squared error of each output channel counts
    seed           of the order of batches
    tell           called after every step
    learning       runs the block in its steps, where chance has a part in what it does then (it must depend on nothing
                   but its arguments); None: `forward`, by which codes are judged in any case
    """

    weights: Mapping[str, Tensor]
    start: Mapping[str, QuantizedWeight]
    forward: Forward
    targets: Sequence[Tensor]
    output_weight: Tensor | None = None
    seed: int = 0
    tell: Tell = tell_nobody
    learning: SteppedForward | None = None


@dataclass(frozen=True)
class BlockSolution:
    """site -> codes; mean squared error of the block's output before and after, over all batches."""

    weights: Mapping[str, QuantizedWeight]
    error_before: float
    error: float
    notes: tuple[str, ...] = ()


class BlockSolver(Protocol):
    @property
    def name(self) -> str: ...
    def with_steps(self, steps: int, *, batches: int) -> BlockSolver:
        """The same solver, taking `steps` steps of `batches` batches each."""

    def refine(self, problem: BlockProblem) -> BlockSolution:
        """Codes with which the block's output is nearer to `targets`, never farther than with those of `start`."""
