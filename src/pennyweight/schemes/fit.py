"""Fitting of scales, zero points and offsets to a weight, min-max or by search."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.core.parallel import chunks, one_thread_per_operation, parallel_map
from pennyweight.kernels.native import has_kernels
from pennyweight.schemes.nested import is_nested, search_nested, span_of
from pennyweight.schemes.parameters import Parameters, spread
from pennyweight.schemes.quantized import grouped
from pennyweight.schemes.rounding import Stored, parents_of, stored_scales, stored_shifts
from pennyweight.schemes.scheme import Scheme
from pennyweight.schemes.search import Candidate, Groups, exact_where_constant, fit_groups, range_of
from pennyweight.schemes.storage import PerTensor, ScaleSpec

Fit = Literal["minmax", "search"]

# Weights per chunk: they stay in a core's second-level cache.
_CHUNK = 1 << 18
# The same where the native search takes them a few groups at a time.
_TILED = 1 << 20
# The same where they are looked at once only.
_PASS = 1 << 21


def fit_scales(w: Tensor, scheme: Scheme, *, importance: Tensor | None = None, fit: Fit = "search") -> Parameters:
    """Scales, zero points or offsets in their stored form, for `w` float [out, in].

    "minmax" takes the smallest scale whose range holds every weight of the group. "search" minimises

        sum_i importance_i * (w_i - decoded_i)**2

    group by group; see `pennyweight.schemes.search`. `importance` [in] is the Hessian's diagonal; ones without data.
    Everything is rounded to its stored type before any error is computed. Offsets, and integer scales and offsets with
    parents, are searched together with these, span by span; see `pennyweight.schemes.nested_twin`. Other scales that
    are codes with parents are fitted twice: as floats, which gives the parents, and then on their grid. A group
    of equal weights c decodes to c, and a group of zeros to zeros, as exactly as the stored types and the values of the
    number format hold them. Scales are never zero. Raises ShapeError.
    """
    shape = scheme.scale_shape(tuple(w.shape))
    if 0 in w.shape:
        return _of_nothing(shape, scheme, w.device)
    weights = None if importance is None else _per_weight(importance, scheme, tuple(w.shape))
    if fit == "search" and is_nested(scheme):
        return _fit_nested(grouped(w, scheme), scheme, weights)
    # The ends of a range are the same in the type in which the weights are stored.
    is_read_once = fit == "minmax" and scheme.is_plain and has_kernels(w, scheme.element)
    view = grouped(w if is_read_once else w.float(), scheme)
    scales, shifts = stored_scales(scheme), stored_shifts(scheme)
    if _has_parents(scheme.scale) or _has_parents(scheme.offset):
        found = _fit(view, scheme, weights, fit, _unbound(scales), None if shifts is None else _unbound(shifts))
        scales = _with_parents(scales, found.scales)
        shifts = None if shifts is None or found.shifts is None else _with_parents(shifts, found.shifts)
    found = _fit(view, scheme, weights, fit, scales, shifts)
    return parameters_of(found, scheme, scales, shifts)


def _fit(
    view: Tensor, scheme: Scheme, weights: Tensor | None, fit: Fit, scales: Stored, shifts: Stored | None
) -> Candidate:
    """The best of each group of `view` [rows, groups, size], a chunk of rows at a time."""
    per_chunk = max(1, (_CHUNK if fit == "search" else _PASS) // max(1, view.shape[1] * view.shape[2]))

    def one(part: slice) -> Candidate:
        shift = None if shifts is None else shifts.rows(part)
        # Contiguous: sums over strided weights are added in another order.
        groups = Groups(view[part].contiguous(), weights, scheme, scales.rows(part), shift)
        return fit_groups(groups, is_searched=fit == "search")

    return Candidate.combined(parallel_map(one, chunks(view.shape[0], per_chunk)), torch.cat)


def _fit_nested(w: Tensor, scheme: Scheme, weights: Tensor | None) -> Parameters:
    """The best of each span of groups of `w` [rows, groups, size] of any float type, a chunk of rows at a time."""

    def one(part: slice) -> Parameters:
        groups = Groups(w[part].float().contiguous(), weights, scheme, stored_scales(scheme), stored_shifts(scheme))
        found = search_nested(groups)
        best = found.candidate
        if found.has_constants:
            groups = replace(groups, scales=found.scales, shifts=found.shifts)
            best = exact_where_constant(groups, best, *range_of(groups))
        return parameters_of(best, scheme, found.scales, found.shifts)

    per_chunk = max(1, _TILED // (w.shape[1] * w.shape[2]))
    return Parameters.combined(parallel_map(one, chunks(w.shape[0], per_chunk)), torch.cat)


def _per_weight(importance: Tensor, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """Importance [in] in the shape that broadcasts over [rows, groups, size]; its mean over each group is 1, or over
    all groups where spans of them share a parent."""
    if tuple(importance.shape) != shape[1:]:
        raise ShapeError(f"importance of shape {tuple(importance.shape)} for {shape[1]} columns: give one for each")
    # Contiguous: a mean over the diagonal of a matrix adds in another order.
    columns = importance.float().contiguous().reshape(1, -1, scheme.group_size(shape[1]))
    with one_thread_per_operation():
        mean = columns.mean(-1, keepdim=True)
    # Each group by itself: beside one column of huge importance all others would count alike. A column that
    # calibration never lit still deserves a sensible scale.
    normal = _to_one(columns, mean).clamp_min(1e-4)
    if is_nested(scheme) and span_of(scheme) > 1:
        # Groups that share a parent are weighed against each other too.
        overall = mean.mean()
        normal = normal * _to_one(mean, overall, dim=1).clamp_min(1e-6)
    return normal.repeat(1, 1, shape[0]) if isinstance(scheme.granularity, PerTensor) else normal


def _to_one(x: Tensor, mean: Tensor, dim: int = -1) -> Tensor:
    """`x` over its mean along `dim`; exactly ones where all are equal, however the mean was rounded, or none count."""
    is_even = (x.amin(dim, keepdim=True) == x.amax(dim, keepdim=True)) | (mean <= 0)
    return torch.where(is_even, 1.0, x / mean)


def _has_parents(spec: ScaleSpec | None) -> bool:
    return spec is not None and spec.parent is not None


def _unbound(stored: Stored) -> Stored:
    """Floats for now where numbers are codes with parents."""
    return (
        stored
        if stored.spec.parent is None
        else Stored(ScaleSpec("float32"), stored.limit, is_unsigned=not stored.is_signed)
    )


def _with_parents(stored: Stored, numbers: Tensor) -> Stored:
    if stored.spec.parent is None:
        return stored
    parents = spread(parents_of(numbers[..., 0], stored.spec).float(), stored.spec)
    return Stored(stored.spec, stored.limit, parents[..., None])


def parameters_of(found: Candidate, scheme: Scheme, scales: Stored, shifts: Stored | None) -> Parameters:
    """`found` [rows, groups, 1] in its stored form, with the parents of `scales` and `shifts`."""
    stored = None
    if found.shifts is not None:
        stored = (found.shifts.to(torch.int16) if shifts is None else shifts.encode(found.shifts))[..., 0]
    is_offset = scheme.offset is not None
    return Parameters(
        scales=scales.encode(found.scales)[..., 0],
        zeros=None if is_offset else stored,
        offsets=stored if is_offset else None,
        parents=_parents(scales),
        offset_parents=_parents(shifts) if is_offset else None,
    )


def _parents(stored: Stored | None) -> Tensor | None:
    """The parents in their stored form, once for each span."""
    if stored is None or stored.parents is None or stored.spec.parent is None:
        return None
    return stored.parents[:, :: stored.spec.span or 1, 0].to(stored.spec.parent.torch_dtype).contiguous()


def _of_nothing(shape: tuple[int, int], scheme: Scheme, device: torch.device) -> Parameters:
    """For a weight without elements."""

    def ones(spec: ScaleSpec | None) -> tuple[Tensor | None, Tensor | None]:
        if spec is None:
            return None, None
        own = torch.ones(shape, dtype=spec.torch_dtype, device=device)
        if spec.parent is None:
            return own, None
        return own, torch.ones(spec.parent_shape(shape), dtype=spec.parent.torch_dtype, device=device)

    (scales, parents), (offsets, offset_parents) = ones(scheme.scale), ones(scheme.offset)
    assert scales is not None
    zeros = None if scheme.zero is None else torch.zeros(shape, dtype=scheme.zero.torch_dtype, device=device)
    return Parameters(scales, zeros, offsets, parents, offset_parents)
