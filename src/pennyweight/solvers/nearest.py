"""Every weight to the nearest value of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.formats import NumberFormat
from pennyweight.kernels.native import as_stored, has_kernels, kernel_table, native
from pennyweight.schemes import Parameters, QuantizedWeight, Scheme, fit_scales
from pennyweight.schemes.fit import Fit
from pennyweight.schemes.quantized import grouped
from pennyweight.solvers.base import Need, Solution, Solver, Statistics

_CHUNK = 1 << 18
# The same for the native kernel, which reads each weight once.
_PASS = 1 << 21


@dataclass(frozen=True)
class Nearest:
    """min over codes of |w - scale * (value(code) - zero)|, or |w - (scale * value(code) - offset)|, weight by weight.

    The scales are fitted first: `fit` "search" weighs the squared error by the Hessian's diagonal, "minmax" does not
    look at it.
    """

    fit: Fit = "search"
    name: str = "nearest"
    needs: frozenset[Need] = frozenset()

    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics) -> Solution:
        """`w` may be of any float type: its weights are taken as they are stored."""
        return Solution(round_to_nearest(w, scheme, fit_scales(w, scheme, importance=stats.importance, fit=self.fit)))


def round_to_nearest(w: Tensor, scheme: Scheme, parameters: Parameters) -> QuantizedWeight:
    """Codes of `w` float [out, in] for given parameters: the value nearest to w / scale + zero or (w + offset) / scale,
    ties to even, saturating."""
    if w.numel() == 0:
        codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
        return QuantizedWeight.of(codes, parameters, scheme)
    view = grouped(w, scheme)
    codes = torch.empty(view.shape, dtype=torch.uint8, device=w.device)
    given = parameters.decoded(scheme)
    is_native = has_kernels(w, scheme.element)
    encode, weights_at_once = (_encode_native, _PASS) if is_native else (_encode, _CHUNK)

    def one(part: slice) -> None:
        scales = given.scales[part, :, None]
        zeros, offsets = (None if x is None else x[part, :, None] for x in (given.zeros, given.offsets))
        weights = view[part] if offsets is None else view[part].float() + offsets
        encode(weights, scales, zeros, scheme.element, codes[part])

    parallel_map(one, chunks(view.shape[0], max(1, weights_at_once // (view.shape[1] * view.shape[2]))))
    return QuantizedWeight.of(codes.reshape(w.shape), parameters, scheme)


def _encode(w: Tensor, scales: Tensor, zeros: Tensor | None, element: NumberFormat, codes: Tensor) -> None:
    """`codes` [rows, groups, size] of float `w` for float32 scales and zeros [rows, groups, 1]."""
    values = w.float() / scales
    codes.copy_(element.encode(values if zeros is None else values.add_(zeros)))


def _encode_native(w: Tensor, scales: Tensor, zeros: Tensor | None, element: NumberFormat, codes: Tensor) -> None:
    library = native()
    assert library is not None
    size = w.shape[-1]
    library.encode_groups(
        as_stored(w).reshape(-1, size),
        scales.flatten(),
        None if zeros is None else zeros.flatten(),
        codes.view(-1, size),
        element.smallest,
        element.largest,
        kernel_table(),
    )


PROVIDES: tuple[Solver, ...] = (Nearest(),)
