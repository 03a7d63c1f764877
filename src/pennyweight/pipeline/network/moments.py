"""What calibration finds about the inputs of a site: second moments, about the mean where the bias is free."""

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
    """Adds rows up, and then gives their moments.

    With `is_centred` these are about the means of x and of x̃. That is the right objective where a bias of its own takes
    up what the site's output is shifted by: the least over b of the mean of |W x̃ - Ŵ x - b|² is that of
    |W (x̃ - mean x̃) - Ŵ (x - mean x)|².
    """

    def __init__(self, groups: int, inputs: int, *, has_cross: bool, is_centred: bool) -> None:
        self._is_centred, self._inputs = is_centred, inputs
        self._hessian = [SecondMoment.zero(inputs)] if groups == 1 else []
        self._cross = [CrossMoment.zero(inputs)] if groups == 1 and has_cross else []
        shape = (groups, inputs, inputs)
        self._many = torch.zeros(shape) if groups > 1 else None
        self._many_cross = torch.zeros(shape) if groups > 1 and has_cross else None
        self._has_cross, self._count = has_cross, 0
        self._origin: list[Tensor] = []
        self._sums = [torch.zeros(groups, inputs, dtype=torch.float64) for _ in range(1 + has_cross)]

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """`x` and, where the cross moment is asked for, `original`, both float32 [groups, rows, in]."""
        parts = [x] if original is None else [x, original]
        if self._is_centred:
            if not self._origin:
                # Sums about a point near the mean lose no digits.
                self._origin = [part.mean(1, keepdim=True) for part in parts]
            parts = [part - origin for part, origin in zip(parts, self._origin, strict=True)]
            for total, part in zip(self._sums, parts, strict=True):
                total += part.sum(1, dtype=torch.float64)
        self._count += x.shape[1]
        if self._many is None:
            if self._has_cross:
                self._cross[0] = self._cross[0].update_([parts[1][0]], [parts[0][0]])
            self._hessian[0] = self._hessian[0].update_([parts[0][0]])
            return
        _add_products_(self._many, parts[0], parts[0])
        if self._many_cross is not None:
            _add_products_(self._many_cross, parts[1], parts[0])

    def finished(self) -> Moments:
        count = max(self._count, 1)
        if self._many is None:
            hessian = self._hessian[0].hessian_()[None]
            cross = self._cross[0].mean_()[None] if self._has_cross else None
        else:
            hessian = self._many.div_(count)
            cross = None if self._many_cross is None else self._many_cross.div_(count)
        if self._is_centred:
            means = [total.div_(count).float() for total in self._sums]
            hessian = hessian.sub_(means[0][:, :, None] * means[0][:, None, :])
            hessian.diagonal(dim1=1, dim2=2).clamp_min_(0)
            if cross is not None:
                cross = cross.sub_(means[1][:, :, None] * means[0][:, None, :])
        return Moments(hessian, cross, self._count)


def _add_products_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += the sum over rows of left rightᵀ; [groups, in, in] and [groups, rows, in] twice."""

    def some(part: slice) -> None:
        total[part] += left[part].transpose(1, 2) @ right[part]

    parallel_map(some, chunks(total.shape[0], _GROUPS))
