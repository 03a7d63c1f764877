"""Every weight to the nearest value of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.schemes import QuantizedWeight, Scheme, fit_scales
from pennyweight.schemes.fit import Fit
from pennyweight.schemes.quantized import grouped
from pennyweight.solvers.base import Solution, Solver, Statistics

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Nearest:
    """min over codes of |w - scale * (value(code) - zero)|, weight by weight.

    The scales are fitted first: `fit` "search" weighs the squared error by the Hessian's diagonal, "minmax" does not
    look at it.
    """

    fit: Fit = "search"
    name: str = "nearest"
    needs_hessian: bool = False

    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics) -> Solution:
        scales, zeros = fit_scales(w, scheme, importance=stats.importance, fit=self.fit)
        return Solution(round_to_nearest(w, scheme, scales, zeros))


def round_to_nearest(w: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None) -> QuantizedWeight:
    """Codes of `w` float [out, in] for given scales and zeros: round(w / scale + zero), ties to even, saturating."""
    if w.numel() == 0:
        return QuantizedWeight(torch.zeros(w.shape, dtype=torch.uint8), scales, zeros, scheme)
    view = grouped(w, scheme)

    def one(part: slice) -> Tensor:
        values = view[part].float() / scales[part, :, None].float()
        return scheme.element.encode(values if zeros is None else values.add_(zeros[part, :, None]))

    parts = parallel_map(one, chunks(view.shape[0], max(1, _CHUNK // (view.shape[1] * view.shape[2]))))
    return QuantizedWeight(torch.cat(parts).reshape(w.shape), scales, zeros, scheme)


PROVIDES: tuple[Solver, ...] = (Nearest(),)
