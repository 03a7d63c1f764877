"""What calibration finds about the inputs of a site: their second moments, one for each group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.solvers.base import Statistics
from pennyweight.stats.cross_moment import CrossMoment
from pennyweight.stats.second_moment import SecondMoment

# Groups of a convolution whose products one thread makes.
_GROUPS = 64


@dataclass(frozen=True)
class Moments:
    """hessian  float32 [groups, in, in]: mean of x xᵀ, x the input behind what has been rounded
    cross    float32 [groups, in, in]: mean of x̃ xᵀ, x̃ the input of the float network in the same place; or None
    rows     how many they were made of
    """

    hessian: Tensor
    cross: Tensor | None
    rows: int

    def of_group(self, index: int) -> Statistics:
        return Statistics(self.hessian[index], None if self.cross is None else self.cross[index])


class Collector:
    """Adds rows up, and then gives their moments."""

    def __init__(self, groups: int, inputs: int, *, has_cross: bool) -> None:
        self._count = 0
        # A single large matrix is summed tile by tile on all threads, many small ones a few at a time.
        self._one = SecondMoment.zero(inputs) if groups == 1 else None
        self._one_cross = CrossMoment.zero(inputs) if groups == 1 and has_cross else None
        shape = (groups, inputs, inputs)
        self._many = torch.zeros(shape) if groups > 1 else None
        self._many_cross = torch.zeros(shape) if groups > 1 and has_cross else None

    def add(self, x: Tensor, original: Tensor) -> None:
        """`x` and the inputs of the float network in the same places, both float32 [groups, rows, in]."""
        self._count += x.shape[1]
        if self._one_cross is not None:
            self._one_cross = self._one_cross.update_([original[0]], [x[0]])
        if self._one is not None:
            self._one = self._one.update_([x[0]])
        if self._many is not None:
            _add_products_(self._many, x, x)
        if self._many_cross is not None:
            _add_products_(self._many_cross, original, x)

    def finished(self) -> Moments:
        """In the memory of the sums, which are used up."""
        count = max(self._count, 1)
        if self._one is not None:
            cross = None if self._one_cross is None else self._one_cross.mean_()[None]
            return Moments(self._one.hessian_()[None], cross, self._count)
        assert self._many is not None
        many_cross = None if self._many_cross is None else self._many_cross.div_(count)
        return Moments(self._many.div_(count), many_cross, self._count)


def _add_products_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += the sum over rows of left rightᵀ; [groups, in, in] and [groups, rows, in] twice."""

    def some(part: slice) -> None:
        total[part] += left[part].transpose(1, 2) @ right[part]

    parallel_map(some, chunks(total.shape[0], _GROUPS))
