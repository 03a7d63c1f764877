"""What a solver of a whole block is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pennyweight.schemes import QuantizedWeight

# Weights by site name, and the number of a batch -> the block's output [windows, tokens, width], differentiable.
Forward = Callable[[Mapping[str, Tensor], int], Tensor]


@dataclass(frozen=True)
class BlockProblem:
    """A block whose sites are to be rounded together so that its output stays.

    weights      site -> the original weight, float32 [out, in]
    start        site -> its codes so far, of a solver that looks at one site at a time
    importance   site -> the Hessian's diagonal [in], where there is one
    forward      runs the block with the given weights in place of its own on a batch of calibration inputs, those that
                 the quantized blocks before it give
    targets      batch -> the output of the original block in the original model, [windows, tokens, width]
    """

    weights: Mapping[str, Tensor]
    start: Mapping[str, QuantizedWeight]
    importance: Mapping[str, Tensor]
    forward: Forward
    targets: Sequence[Tensor]


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
    def refine(self, problem: BlockProblem) -> BlockSolution:
        """Codes with which the block's output is nearer to `targets`, never farther than with those of `start`."""
