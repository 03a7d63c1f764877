"""What a solver is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pennyweight.schemes import QuantizedWeight, Scheme


@dataclass(frozen=True)
class Statistics:
    """What calibration found about a site's input; None where there was no data.

    hessian   float32 [in, in]: mean of x xᵀ over the calibration tokens
    """

    hessian: Tensor | None = None

    @property
    def importance(self) -> Tensor | None:
        """The Hessian's diagonal [in]."""
        return None if self.hessian is None else self.hessian.diagonal()


@dataclass(frozen=True)
class Solution:
    """A quantized weight, and what had to be done otherwise than asked: raised damping, a fallback."""

    weight: QuantizedWeight
    notes: tuple[str, ...] = ()


class Solver(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def needs_hessian(self) -> bool: ...
    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics) -> Solution:
        """Round `w` float32 [out, in] so that the error seen through `stats` is small."""
