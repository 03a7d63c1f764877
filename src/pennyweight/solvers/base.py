"""What a solver is."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from pennyweight.schemes import QuantizedWeight, Scheme

Made = TypeVar("Made")
# What a solver asks of calibration, by the names of the fields of Statistics.
Need = Literal["hessian", "cross"]


@dataclass(frozen=True)
class Statistics:
    """What calibration found about a site's input; None where there was no data.

    hessian   float32 [in, in]: mean of x xᵀ over the calibration tokens, x the input behind the quantized blocks before
    cross     float32 [in, in]: mean of x̃ xᵀ, x̃ the input of the original model for the same token
    diagonal  float32 [in]: the Hessian's diagonal, where no more of it is known
    """

    hessian: Tensor | None = None
    cross: Tensor | None = None
    diagonal: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def remember(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` derives from these statistics, made once: sites that share an input share its factorisation."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    @property
    def importance(self) -> Tensor | None:
        """The Hessian's diagonal [in]."""
        return self.diagonal if self.hessian is None else self.hessian.diagonal()


@dataclass(frozen=True)
class Solution:
    """A quantized weight, and what had to be done otherwise than asked: raised damping, a fallback."""

    weight: QuantizedWeight
    notes: tuple[str, ...] = ()


class Solver(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics) -> Solution:
        """Round `w` float32 [out, in] so that the error seen through `stats` is small."""
