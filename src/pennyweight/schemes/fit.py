"""Fitting of scales and zero points to a weight, min-max or by search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.core.parallel import chunks, one_thread_per_operation, parallel_map
from pennyweight.kernels.native import STORED, as_stored, has_kernels, kernel_table, native
from pennyweight.schemes.quantized import grouped
from pennyweight.schemes.scheme import PerTensor, Scheme

Fit = Literal["minmax", "search"]

# Weights per chunk: they stay in a core's second-level cache.
_CHUNK = 1 << 18
# The same where they are looked at once only.
_PASS = 1 << 21
# Shrink factors of the range that the search tries, widest first. Low widths gain from clipping far more.
_GRIDS = {bits: tuple(1.0 - step * i for i in range(count)) for bits, step, count in (
    (2, 0.05, 14), (3, 0.04, 14), (4, 0.03, 13), (5, 0.025, 10), (6, 0.02, 8), (7, 0.01, 8), (8, 0.005, 8),
)}  # fmt: skip


@dataclass(frozen=True)
class _Candidate:
    """Scales already rounded to their stored type, as float32, and zeros; both [rows, groups, 1]."""

    scales: Tensor
    zeros: Tensor | None


def fit_scales(
    w: Tensor, scheme: Scheme, *, importance: Tensor | None = None, fit: Fit = "search"
) -> tuple[Tensor, Tensor | None]:
    """Scales [rows, groups] in their stored type, and int16 zero points or None, for `w` float [out, in].

    "minmax" takes the smallest scale whose range holds every weight of the group. "search" minimises

        sum_i importance_i * (w_i - scale * (value_i - zero))**2

    over a grid of shrunken ranges, symmetric ones with the sign that gives the longer side of the range to the
    larger extreme, followed by least-squares steps for the scale, s = sum(h w q) / sum(h q q), kept where better.
    `importance` [in] is the Hessian's diagonal; ones without data. Scales are rounded to the stored type before
    any error is computed. A group of equal weights c gets scale c or -c and decodes to c as exactly as the stored type
    holds it; a group of zeros gets scale 1. Raises ShapeError.
    """
    rows, groups = scheme.scale_shape(tuple(w.shape))
    if 0 in w.shape:
        empty = torch.ones(rows, groups, dtype=scheme.scale.torch_dtype, device=w.device)
        return empty, torch.zeros(rows, groups, dtype=torch.int16, device=w.device) if scheme.zero else None
    # The ends of a range are the same in the type in which the weights are stored.
    view = grouped(w if fit == "minmax" else w.float(), scheme)
    weights = None if importance is None else _per_weight(importance, scheme, tuple(w.shape))
    per_chunk = max(1, (_CHUNK if fit == "search" else _PASS) // max(1, view.shape[1] * view.shape[2]))

    def one(part: slice) -> _Candidate:
        # Contiguous: sums over strided weights are added in another order.
        return _fit_chunk(view[part].contiguous(), scheme, weights=weights, fit=fit)

    parts = parallel_map(one, chunks(view.shape[0], per_chunk))
    scales = torch.cat([part.scales for part in parts])[..., 0].to(scheme.scale.torch_dtype)
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return scales, torch.cat(zeros)[..., 0].to(torch.int16) if zeros else None


def _per_weight(importance: Tensor, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """Importance [in] in the shape that broadcasts over [rows, groups, size]; its mean over each group is 1."""
    if tuple(importance.shape) != shape[1:]:
        raise ShapeError(f"importance of shape {tuple(importance.shape)} for {shape[1]} columns: give one for each")
    columns = importance.float().reshape(1, -1, scheme.group_size(shape[1]))
    with one_thread_per_operation():
        mean = columns.mean(-1, keepdim=True)
    # Each group by itself: beside one column of huge importance all others would count alike. A column that
    # calibration never lit still deserves a sensible scale.
    normal = torch.where(mean > 0, columns / mean, 1.0).clamp_min(1e-4)
    return normal.repeat(1, 1, shape[0]) if isinstance(scheme.granularity, PerTensor) else normal


def _fit_chunk(w: Tensor, scheme: Scheme, *, weights: Tensor | None, fit: Fit) -> _Candidate:
    low, high = _range(w, scheme)
    best = _minmax(low, high, scheme)
    if fit == "search":
        search = _search_native if has_kernels(w, scheme.element) else _search
        best = search(w, best, low=low, high=high, scheme=scheme, weights=weights)
    return _exact_where_constant(best, low=low, high=high, scheme=scheme)


def _range(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each group, [rows, groups, 1]."""
    library = native() if has_kernels(w, scheme.element) else None
    if library is None:
        return w.amin(-1, keepdim=True).float(), w.amax(-1, keepdim=True).float()
    low, high = torch.empty(2, w.shape[0] * w.shape[1])
    library.range_groups(as_stored(w).reshape(-1, w.shape[2]), low, high, kernel_table())
    shape = (w.shape[0], w.shape[1], 1)
    return low.reshape(shape), high.reshape(shape)


def _minmax(low: Tensor, high: Tensor, scheme: Scheme) -> _Candidate:
    """The smallest scale that reaches both ends, and the zero point that places the range; 0 is always in the range."""
    smallest, largest = scheme.element.smallest, scheme.element.largest
    if scheme.zero is not None:
        low, high = low.clamp_max(0), high.clamp_min(0)
        return _with_zero(low, (high - low) / (largest - smallest), scheme)
    if smallest < 0:
        return _Candidate(_stored(torch.maximum(high / largest, low / smallest), scheme), None)
    # Without values below zero only one sign can be held: that of the larger extreme.
    return _Candidate(_stored(torch.where(-low > high, low, high) / largest, scheme), None)


def _with_zero(low: Tensor, scale: Tensor, scheme: Scheme) -> _Candidate:
    scales = _stored(scale, scheme)
    smallest, largest = scheme.element.smallest, scheme.element.largest
    return _Candidate(scales, (smallest - low / scales).round_().clamp_(smallest, largest))


def _stored(scale: Tensor, scheme: Scheme, *, reach: float | None = None) -> Tensor:
    """`scale` rounded to the stored type and back to float32: never zero, and `reach` times it is finite in that type.

    `reach` is by default the largest |value - zero| of the scheme.
    """
    kind = torch.finfo(scheme.scale.torch_dtype)
    limit = _limit(scheme, reach=reach)
    rounded = scale.clamp(-limit, limit).to(scheme.scale.torch_dtype).float()
    # Too small for the stored type: the smallest normal number it holds keeps the division finite.
    return torch.where(rounded == 0, kind.smallest_normal, rounded)


def _limit(scheme: Scheme, *, reach: float | None = None) -> float:
    """The largest magnitude of a scale."""
    return torch.finfo(scheme.scale.torch_dtype).max / (2.0**scheme.element.bits if reach is None else reach)


def _search(
    w: Tensor, first: _Candidate, *, low: Tensor, high: Tensor, scheme: Scheme, weights: Tensor | None
) -> _Candidate:
    buffer = torch.empty_like(w)
    best, lowest = first, _error(w, first, scheme, weights, buffer)
    for candidate in _candidates(low, high, scheme):
        best, lowest = _better(best, lowest, candidate, _error(w, candidate, scheme, weights, buffer))
    for _ in range(2):
        candidate = _least_squares(w, best, scheme, weights)
        best, lowest = _better(best, lowest, candidate, _error(w, candidate, scheme, weights, buffer))
    return best


def _search_native(
    w: Tensor, first: _Candidate, *, low: Tensor, high: Tensor, scheme: Scheme, weights: Tensor | None
) -> _Candidate:
    """The same as `_search`, up to the order of sums."""
    library = native()
    assert library is not None
    rows, groups, size = w.shape
    scales = first.scales.flatten().clone()
    zeros = None if first.zeros is None else first.zeros.flatten().clone()
    kind = torch.finfo(scheme.scale.torch_dtype)
    library.search_groups(
        w.reshape(rows * groups, size),
        None if weights is None else weights.reshape(-1, size),
        scales,
        zeros,
        torch.tensor(_factors(scheme)),
        scheme.element.smallest,
        scheme.element.largest,
        _limit(scheme),
        kind.smallest_normal,
        STORED[scheme.scale.torch_dtype],
        kernel_table(),
    )
    shape = (rows, groups, 1)
    return _Candidate(scales.reshape(shape), None if zeros is None else zeros.reshape(shape))


def _candidates(low: Tensor, high: Tensor, scheme: Scheme) -> Iterator[_Candidate]:
    smallest, largest = scheme.element.smallest, scheme.element.largest
    if scheme.zero is not None:
        low, high = low.clamp_max(0), high.clamp_min(0)
        for factor in _factors(scheme):
            yield _with_zero(low * factor, (high - low) * (factor / (largest - smallest)), scheme)
        return
    # The side of the range with one more value faces the larger extreme, if need be by a negative scale.
    extreme = torch.where(-low >= high, low, high)
    full = extreme / smallest if smallest < 0 else extreme / largest
    for factor in _factors(scheme):
        yield _Candidate(_stored(full * factor, scheme), None)


def _factors(scheme: Scheme) -> tuple[float, ...]:
    """What the search multiplies the full range by."""
    shrinking = _GRIDS[scheme.element.bits]
    # Upwards too: at few bits the largest weight may sit best one value below the end of the range.
    return shrinking if scheme.zero is not None else (1.15, *shrinking)


def _quantized_values(w: Tensor, candidate: _Candidate, scheme: Scheme, out: Tensor) -> Tensor:
    """value - zero for each weight, written to `out`."""
    torch.mul(w, candidate.scales.reciprocal(), out=out)
    if candidate.zeros is None:
        return out.copy_(scheme.element.nearest(out))
    return out.copy_(scheme.element.nearest(out.add_(candidate.zeros))).sub_(candidate.zeros)


def _error(w: Tensor, candidate: _Candidate, scheme: Scheme, weights: Tensor | None, buffer: Tensor) -> Tensor:
    error = _quantized_values(w, candidate, scheme, buffer).mul_(candidate.scales).sub_(w).square_()
    if weights is not None:
        error.mul_(weights)
    return error.sum(-1, keepdim=True)


def _least_squares(w: Tensor, candidate: _Candidate, scheme: Scheme, weights: Tensor | None) -> _Candidate:
    """s = sum(h w q) / sum(h q q) with the codes of `candidate`, rounded to the stored type."""
    q = _quantized_values(w, candidate, scheme, torch.empty_like(w))
    hq = q if weights is None else q * weights
    over = (hq * q).sum(-1, keepdim=True)
    scale = torch.where(over > 0, (hq * w).sum(-1, keepdim=True) / over, candidate.scales)
    return _Candidate(_stored(scale, scheme), candidate.zeros)


def _better(best: _Candidate, lowest: Tensor, other: _Candidate, error: Tensor) -> tuple[_Candidate, Tensor]:
    wins = error < lowest
    zeros = torch.where(wins, other.zeros, best.zeros) if other.zeros is not None and best.zeros is not None else None
    return _Candidate(torch.where(wins, other.scales, best.scales), zeros), torch.where(wins, error, lowest)


def _exact_where_constant(best: _Candidate, *, low: Tensor, high: Tensor, scheme: Scheme) -> _Candidate:
    """Groups of one value c: scale |c| with value +-1, or scale c where the format has no -1 and no zero point; of
    zeros: scale 1."""
    # A constant beyond the stored type has no such scale: it keeps the range that reaches furthest.
    constant = (low == high) & (low.abs() <= torch.finfo(scheme.scale.torch_dtype).max)
    signless = scheme.element.smallest >= 0 and scheme.zero is None
    exact = _stored(low if signless else low.abs(), scheme, reach=1.0)
    exact = torch.where(low == 0, 1.0, exact)
    zeros = best.zeros
    if zeros is not None:
        # Unsigned codes reach below zero only from a zero point of 1.
        base = torch.where(low < 0, 1.0, 0.0) if scheme.element.smallest >= 0 else torch.zeros_like(low)
        zeros = torch.where(constant, base, zeros)
    return _Candidate(torch.where(constant, exact, best.scales), zeros)
