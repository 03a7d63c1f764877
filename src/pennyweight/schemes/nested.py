"""The search of offsets, and of scales and offsets that are codes with parents: what it tries, and its native form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pennyweight.formats.integer import Int
from pennyweight.kernels.native import STORED, has_kernels, kernel_table, native, table_of
from pennyweight.schemes.nested_twin import Effort, Nested, search_nested_plainly
from pennyweight.schemes.parameters import spread
from pennyweight.schemes.rounding import Stored
from pennyweight.schemes.scheme import Scheme
from pennyweight.schemes.search import Candidate, Groups, factors_of
from pennyweight.schemes.storage import ScaleSpec

# What each end of the range is multiplied by, by the bits of a code: the first, the last and how many.
_ENDS = {2: (1.15, 0.4, 7), 3: (1.2, 0.55, 8), 4: (1.2, 0.7, 9), 5: (1.1, 0.79, 9), 6: (1.06, 0.86, 7)}
_FINE_ENDS = (1.03, 0.94, 5)
# For more than 4 bits the search of plain scales is content with fewer.
_FACTORS = {6: (1.08, 0.80, 20)}


def effort_of(groups: Groups) -> Effort:
    scheme = groups.scheme
    element = scheme.scale.element
    return Effort(
        factors=_grid(groups),
        shares=_line(1.1, 0.7, 32),
        span=span_of(scheme),
        parents=2 if scheme.offset is None else 4,
        # A code of 8 bits changes a scale by a quarter of what one of 6 bits does.
        reach=1 if element is None or element.bits <= 6 else 2 ** (element.bits - 6),
        is_thorough=scheme.offset is not None,
    )


def is_nested(scheme: Scheme) -> bool:
    """Whether this search takes the scheme: offsets, or integer codes with parents that rows do not share."""
    specs = [spec for spec in (scheme.scale, scheme.offset) if spec is not None]
    if scheme.zero is not None or scheme.rows_share or (scheme.offset is None and scheme.scale.parent is None):
        return False
    spans = {spec.span for spec in specs if spec.parent is not None}
    return len(spans) <= 1 and all(spec.element is None or _is_code(spec) for spec in specs)


def _is_code(spec: ScaleSpec) -> bool:
    return isinstance(spec.element, Int) and spec.parent is not None


def span_of(scheme: Scheme) -> int:
    """How many groups are decided on together."""
    specs = [spec for spec in (scheme.scale, scheme.offset) if spec is not None]
    return next((spec.span for spec in specs if spec.span is not None), 1)


def search_nested(groups: Groups) -> Nested:
    """The best scales, offsets and parents for groups whose `scales` and `shifts` have no parents yet."""
    effort = effort_of(groups)
    return _native(groups, effort) if _has_native(groups) else search_nested_plainly(groups, effort)


def _has_native(groups: Groups) -> bool:
    has_span = span_of(groups.scheme) in {1, 2, 4, 8, 16}
    return has_span and has_kernels(groups.w, groups.scheme.element, tables=True)


def _native(groups: Groups, effort: Effort) -> Nested:
    """The same as `search_nested_plainly`, up to the order of sums."""
    library = native()
    assert library is not None
    scheme = groups.scheme
    rows, count, size = groups.w.shape
    scales = _field(groups.scales, rows * count)
    shifts = None if groups.shifts is None else _field(groups.shifts, rows * count)
    has_constants = library.search_nested(
        groups.w.reshape(rows * count, size),
        None if groups.weights is None else groups.weights.reshape(-1, size),
        scales,
        shifts,
        torch.tensor(effort.factors),
        torch.tensor(effort.shares),
        effort.parents,
        effort.reach,
        effort.is_thorough,
        effort.span,
        scheme.element.smallest,
        scheme.element.largest,
        None if isinstance(scheme.element, Int) else table_of(scheme.element),
        kernel_table(),
    )

    def stored(one: Stored, parents: Tensor | None) -> Stored:
        return one if parents is None else replace(one, parents=spread(parents.reshape(rows, -1), one.spec)[..., None])

    shape = (rows, count, 1)
    found = Candidate(scales[0].reshape(shape), None if shifts is None else shifts[0].reshape(shape))
    kept = None if groups.shifts is None or shifts is None else stored(groups.shifts, shifts[1])
    return Nested(found, stored(groups.scales, scales[1]), kept, has_constants)


_Field = tuple[Tensor, Tensor | None, int, float, float, float, float, float, float]


def _field(stored: Stored, groups: int) -> _Field:
    """What csrc/kernels.h calls a Field."""
    spec = stored.spec
    values = torch.empty(groups)
    if spec.parent is None or spec.element is None or spec.span is None:
        bounds = torch.finfo(spec.torch_dtype)
        return (values, None, STORED[spec.torch_dtype], -1.0, 1.0, stored.limit, 0.0, bounds.smallest_normal, 0.0)
    kind, element = spec.parent.torch_dtype, spec.element
    bounds = torch.finfo(kind)
    limit = min(bounds.max, torch.finfo(torch.float32).max / element.largest)
    own = (STORED[kind], element.smallest, element.largest, stored.limit)
    return (values, torch.empty(groups // spec.span), *own, limit, 1.0, bounds.smallest_normal)


def _grid(groups: Groups) -> tuple[tuple[float, ...], ...]:
    """Factors of the range, or of each of its ends where an offset places it."""
    bits = groups.scheme.element.bits
    if groups.shifts is None:
        return tuple((factor,) for factor in (_line(*_FACTORS[bits]) if bits in _FACTORS else factors_of(groups)))
    ends = _line(*_ENDS.get(bits, _FINE_ENDS))
    return tuple((below, above) for below in ends for above in ends)


def _line(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * i / (count - 1) for i in range(count))
