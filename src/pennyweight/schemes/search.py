"""The search of scales, zero points and offsets, group by group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.formats import NumberFormat
from pennyweight.formats.integer import Int
from pennyweight.formats.minifloat import Minifloat
from pennyweight.kernels.native import STORED, as_stored, has_kernels, kernel_table, native, table_of
from pennyweight.schemes.rounding import Stored, spread_of, stored_scales
from pennyweight.schemes.scheme import Scheme

# What the search multiplies the range by, by the bits of a code. Low widths gain from clipping far more; above 1 too,
# because at few bits the largest weight may sit best beside the end of the range.
_SYMMETRIC = {bits: (first, last, count) for bits, first, last, count in (
    (2, 1.35, 0.30, 18), (3, 1.35, 0.45, 16), (4, 1.35, 0.60, 16), (5, 1.15, 0.70, 12), (6, 1.08, 0.80, 10),
    (7, 1.03, 0.90, 8), (8, 1.02, 0.95, 8),
)}  # fmt: skip
# The same for each end of the range by itself, where a zero point or an offset places it.
_ENDS = {
    2: (1.15, 1.0, 0.85, 0.7, 0.55, 0.4),
    3: (1.15, 1.0, 0.9, 0.8, 0.7, 0.6),
    4: (1.2, 1.1, 1.0, 0.9, 0.8, 0.7),
    5: (1.1, 1.0, 0.93, 0.86, 0.79),
    6: (1.04, 1.0, 0.94, 0.88),
    7: (1.02, 1.0, 0.97, 0.94),
    8: (1.01, 1.0, 0.985, 0.97),
}
# Small floats of 8 bits keep their precision over many powers of two, so the range may be moved within one.
_FLOATING = (2.0, 1.0, 24)
# Above these bits the one value more on one side of zero no longer pays for trying both signs of the scale.
_BITS_OF_BOTH_SIGNS = 4
# Bounds on what nearly always ends earlier, because no group gains any more.
_STEPS, _MOVES = 8, 3


@dataclass(frozen=True)
class Candidate:
    """Scales, and zero points or offsets, already rounded to what is stored, as float32 [rows, groups, 1]."""

    scales: Tensor
    shifts: Tensor | None

    @staticmethod
    def combined(parts: Sequence[Candidate], combine: Callable[[list[Tensor]], Tensor]) -> Candidate:
        """`combine` of the scales of all `parts`, and of their shifts where they have any."""
        shifts = [part.shifts for part in parts if part.shifts is not None]
        return Candidate(combine([part.scales for part in parts]), combine(shifts) if shifts else None)

    def or_where(self, wins: Tensor, other: Candidate) -> Candidate:
        """`other` in the groups where it `wins`."""
        return Candidate.combined((other, self), lambda pair: torch.where(wins, pair[0], pair[1]))


@dataclass(frozen=True)
class Groups:
    """Groups of weights and how their parameters are stored.

    w        float32 [rows, groups, size], contiguous; of any float type where only ranges are asked for
    weights  importance that broadcasts over `w`, or None for ones
    shifts   of offsets and of zero points that are floats
    """

    w: Tensor
    weights: Tensor | None
    scheme: Scheme
    scales: Stored
    shifts: Stored | None

    def quantized(self, c: Candidate) -> Tensor:
        """value(code) of each weight: the nearest one for these parameters."""
        inverse = c.scales.reciprocal()
        if c.shifts is None:
            return self.scheme.element.nearest(self.w * inverse)
        if self.scheme.offset is not None:
            return self.scheme.element.nearest((self.w + c.shifts) * inverse)
        return self.scheme.element.nearest(torch.mul(self.w, inverse).add_(c.shifts))

    def error(self, c: Candidate) -> Tensor:
        """sum_i importance_i (decoded_i - w_i)**2, [rows, groups, 1]."""
        values = self.quantized(c)
        if c.shifts is None:
            decoded = values.mul_(c.scales)
        elif self.scheme.offset is not None:
            decoded = values.mul_(c.scales).sub_(c.shifts)
        else:
            decoded = values.sub_(c.shifts).mul_(c.scales)
        return self.sum(decoded.sub_(self.w).square_())

    def sum(self, x: Tensor) -> Tensor:
        """sum_i importance_i x_i of each group; `x` may be edited."""
        return (x if self.weights is None else x.mul_(self.weights)).sum(-1, keepdim=True)


@dataclass(frozen=True)
class _Best:
    """The best candidate of each group so far, and its error."""

    candidate: Candidate
    error: Tensor

    def or_better(self, groups: Groups, other: Candidate) -> _Best:
        error = groups.error(other)
        wins = error < self.error
        return _Best(self.candidate.or_where(wins, other), torch.where(wins, error, self.error))


def fit_groups(groups: Groups, *, is_searched: bool) -> Candidate:
    """The best parameters of each group; where all weights of a group are equal, those that decode exactly."""
    low, high = range_of(groups)
    found = _minmax(groups, low, high)
    if is_searched:
        found = (_search_native if _has_native(groups) else _search)(groups, found, low, high)
    return exact_where_constant(groups, found, low, high)


def range_of(groups: Groups) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each group, [rows, groups, 1]."""
    w = groups.w
    library = native() if has_kernels(w, groups.scheme.element) else None
    if library is None:
        return w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    low, high = torch.empty(2, w.shape[0] * w.shape[1])
    library.range_groups(as_stored(w).reshape(-1, w.shape[2]), low, high, kernel_table())
    shape = (w.shape[0], w.shape[1], 1)
    return low.reshape(shape), high.reshape(shape)


def _minmax(groups: Groups, low: Tensor, high: Tensor) -> Candidate:
    """The smallest scale that reaches both ends, and the zero point or offset that places the range."""
    element = groups.scheme.element
    if groups.scheme.zero is not None or groups.scheme.offset is not None:
        return _placed(groups, low, high)
    if element.smallest < 0:
        return Candidate(groups.scales.nonzero(torch.maximum(high / element.largest, low / element.smallest)), None)
    # Without values below zero only one sign can be held: that of the larger extreme.
    return Candidate(groups.scales.nonzero(torch.where(-low > high, low, high) / element.largest), None)


def _placed(groups: Groups, low: Tensor, high: Tensor) -> Candidate:
    """The range from `low` to `high` as a scale and a zero point or an offset."""
    scheme, smallest = groups.scheme, groups.scheme.element.smallest
    if groups.shifts is None or not groups.shifts.is_signed:
        # An integer zero point lies in the range of the codes, so 0 is in that of the weights.
        low, high = low.clamp_max(0), high.clamp_min(0)
    scales = groups.scales.nonzero((high - low) / spread_of(scheme))
    if scheme.offset is not None:
        assert groups.shifts is not None
        return Candidate(scales, groups.shifts.nearest(smallest * scales - low))
    zeros = smallest - low / scales
    if groups.shifts is not None:
        return Candidate(scales, groups.shifts.nearest(zeros))
    return Candidate(scales, zeros.round_().clamp_(smallest, scheme.element.largest))


def _search(groups: Groups, first: Candidate, low: Tensor, high: Tensor) -> Candidate:
    """The candidates of a grid; least squares from the best of them; for integer zero points, steps of one."""
    best = _Best(first, groups.error(first))
    for candidate in _candidates(groups, low, high):
        best = best.or_better(groups, candidate)
        if groups.shifts is not None:
            best = best.or_better(groups, _least_squares(groups, candidate))
    best = _settled(groups, best)
    for _ in range(_MOVES if groups.scheme.has_integer_zero else 0):
        moved = best
        for step in (-1.0, 1.0):
            moved = moved.or_better(groups, _least_squares(groups, _stepped(groups, moved.candidate, step)))
        moved = _settled(groups, moved)
        if torch.equal(moved.error, best.error):
            break
        best = moved
    return best.candidate


def _settled(groups: Groups, best: _Best) -> _Best:
    """Least squares and rounding to nearest in turns, until no group gains."""
    for _ in range(_STEPS):
        better = best.or_better(groups, _least_squares(groups, best.candidate))
        if torch.equal(better.error, best.error):
            break
        best = better
    return best


def _stepped(groups: Groups, c: Candidate, step: float) -> Candidate:
    assert c.shifts is not None
    element = groups.scheme.element
    return Candidate(c.scales, (c.shifts + step).clamp_(element.smallest, element.largest))


def _has_native(groups: Groups) -> bool:
    """Integers with plain parameters; without zero points and offsets also small tables, and scales that are codes."""
    scheme = groups.scheme
    if groups.scales.is_unsigned:
        return False
    if scheme.zero is not None or scheme.offset is not None:
        return scheme.is_plain and has_kernels(groups.w, scheme.element)
    return has_kernels(groups.w, scheme.element, tables=True)


def _search_native(groups: Groups, first: Candidate, low: Tensor, high: Tensor) -> Candidate:
    """The same as `_search`, up to the order of sums."""
    library = native()
    assert library is not None
    scheme = groups.scheme
    stored, parents = groups.scales.spec, groups.scales.parents
    rows, count, size = groups.w.shape
    scales = first.scales.flatten().clone()
    zeros = None if first.shifts is None else first.shifts.flatten().clone()
    library.search_groups(
        groups.w.reshape(rows * count, size),
        None if groups.weights is None else groups.weights.reshape(-1, size),
        scales,
        zeros,
        torch.tensor(factors_of(groups) if zeros is None else ends_of(scheme)).reshape(-1, 1 if zeros is None else 2),
        scheme.element.smallest,
        scheme.element.largest,
        groups.scales.limit,
        float(replace(groups.scales, parents=None).smallest),
        STORED[torch.float32 if stored.element is not None else stored.torch_dtype],
        None if isinstance(scheme.element, Int) else table_of(scheme.element),
        None if stored.element is None else table_of(stored.element),
        None if parents is None else parents.expand(rows, count, 1).flatten(),
        kernel_table(),
    )
    shape = (rows, count, 1)
    return Candidate(scales.reshape(shape), None if zeros is None else zeros.reshape(shape))


def _candidates(groups: Groups, low: Tensor, high: Tensor) -> Iterator[Candidate]:
    scheme, smallest, largest = groups.scheme, groups.scheme.element.smallest, groups.scheme.element.largest
    if scheme.has_integer_zero:
        low, high = low.clamp_max(0), high.clamp_min(0)
        for below, above in ends_of(scheme):
            yield _placed(groups, low * below, high * above)
    elif groups.shifts is not None:
        half = (high - low) / 2
        for below, above in ends_of(scheme):
            yield _placed(groups, low + (1 - below) * half, high - (1 - above) * half)
    else:
        # The side of the range with one more value faces the larger extreme, if need be by a negative scale.
        extreme = torch.where(-low >= high, low, high)
        full = extreme / smallest if smallest < 0 else extreme / largest
        for factor in factors_of(groups):
            yield Candidate(groups.scales.nonzero(full * factor), None)


def ends_of(scheme: Scheme) -> list[tuple[float, float]]:
    return [(below, above) for below in _ENDS[scheme.element.bits] for above in _ENDS[scheme.element.bits]]


def factors_of(groups: Groups) -> tuple[float, ...]:
    """What the search multiplies the full range by; below zero for scales of the other sign."""
    scheme = groups.scheme
    if isinstance(scheme.scale.element, Minifloat) and scheme.scale.element.mantissa == 0:
        return (2.0, 1.0, 0.5, 0.25)
    is_floating = isinstance(scheme.element, Minifloat) and scheme.element.bits == 8
    first, last, count = _FLOATING if is_floating else _SYMMETRIC[scheme.element.bits]
    factors = tuple(first + (last - first) * i / (count - 1) for i in range(count))
    is_one_sided = (
        not groups.scales.is_signed or scheme.element.bits > _BITS_OF_BOTH_SIGNS or is_mirrored(scheme.element)
    )
    return factors if is_one_sided else factors + tuple(-factor for factor in factors)


def is_mirrored(element: NumberFormat) -> bool:
    """Whether -v is a value wherever v is one: the sign of a scale makes no difference then."""
    values = element.decode(torch.arange(2**element.bits, dtype=torch.uint8))
    values = values[values.isfinite() & (values <= element.largest)]
    return torch.equal(values.sort().values, -values.sort(descending=True).values)


def _least_squares(groups: Groups, c: Candidate) -> Candidate:
    """What is best for the codes of `c`, in float32 sums, rounded to what is stored.

    With q = value - zero: s = sum(h w q) / sum(h q q). A zero point or an offset b (in weights: scale * zero) that is
    no integer comes from the same problem in two unknowns, sum h (s v - b - w)**2 with v the values:

        | sum h v v   -sum h v |  | s |   |  sum h v w |
        | -sum h v     sum h   |  | b | = | -sum h w   |

    b is rounded, and s made again for the rounded one.
    """
    values = groups.quantized(c)
    if groups.shifts is None:
        q = values if c.shifts is None else values - c.shifts
        return Candidate(_best_scale(groups, q, groups.w, c.scales), c.shifts)
    ones = groups.sum(torch.ones_like(values))
    v, w = groups.sum(values.clone()), groups.sum(groups.w.clone())
    vv, vw = groups.sum(values * values), groups.sum(values * groups.w)
    determinant = vv * ones - v * v
    scale = torch.where(determinant > 0, (vw * ones - v * w) / determinant, c.scales)
    scale = groups.scales.nonzero(scale)
    offset = (scale * v - w) / ones
    if groups.scheme.offset is not None:
        shifts = groups.shifts.nearest(offset)
        return Candidate(_best_scale(groups, values, groups.w + shifts, scale), shifts)
    shifts = groups.shifts.nearest(offset / scale)
    return Candidate(_best_scale(groups, values - shifts, groups.w, scale), shifts)


def _best_scale(groups: Groups, q: Tensor, w: Tensor, otherwise: Tensor) -> Tensor:
    """sum(h w q) / sum(h q q), or `otherwise` where all q are 0."""
    over = groups.sum(q * q)
    return groups.scales.nonzero(torch.where(over > 0, groups.sum(q * w) / over, otherwise))


def exact_where_constant(groups: Groups, best: Candidate, low: Tensor, high: Tensor) -> Candidate:
    """Groups of one value c, and of zeros: see `_exact`. The rest stays as it is."""
    scheme = groups.scheme
    scales = stored_scales(scheme, reach=1.0)
    if scheme.scale.element is not None:
        scales = groups.scales
    # A constant beyond the stored type has no such scale: it keeps the range that reaches furthest.
    constant = (low == high) & (low.abs() <= scales.limit)
    if not constant.any():
        return best
    exact = _exact(groups, scales, low)
    if scheme.scale.element is not None or (groups.shifts is not None and groups.shifts.spec.element is not None):
        # Codes may hold it less well than what was found.
        constant = constant & (groups.error(exact) <= groups.error(best))
    return best.or_where(constant, exact)


def _exact(groups: Groups, scales: Stored, constant: Tensor) -> Candidate:
    """Scale |c| / u with the values u and -u, u a power of two of the format; scale 1 for zeros.

    Where the format has no -u and nothing shifts it: scale c / u. Unsigned integers reach below zero only from a zero
    point of 1. A float zero point turns the value v nearest to zero into 0 for zeros, else into 1 by way of v - 1, with
    scale c; an offset of v does so for zeros. A format without a 0 and without either (bal2) holds zeros only as the
    smallest scale times its smallest value.
    """
    scheme, element = groups.scheme, groups.scheme.element
    unit, has_both = _unit(scheme)
    zeros = torch.zeros_like(constant)
    base = float(element.nearest(torch.zeros(1)))
    if groups.shifts is not None and scheme.zero is not None:
        shift = torch.where(constant == 0, base, base - 1.0)
        return Candidate(torch.where(constant == 0, 1.0, scales.nonzero(constant)), shift)
    has_sign = scales.is_signed and not (has_both or scheme.has_integer_zero)
    wanted = (constant if has_sign else constant.abs()) / unit
    has_zero = base == 0 or scheme.offset is not None
    scale = torch.where(constant == 0, scales.nonzero(torch.full_like(wanted, float(has_zero))), scales.nonzero(wanted))
    if groups.shifts is not None:
        return Candidate(scale, groups.shifts.nearest(torch.where(constant == 0, base * scale, zeros)))
    if scheme.zero is None:
        return Candidate(scale, None)
    return Candidate(scale, torch.where(constant < 0, 1.0, 0.0) if element.smallest >= 0 and scheme.zero else zeros)


def _unit(scheme: Scheme) -> tuple[float, bool]:
    """The largest power of two up to 1 among the values, and whether its negative is one too."""
    codes = torch.arange(2**scheme.element.bits, dtype=torch.uint8)
    values = set(scheme.element.decode(codes).tolist())
    unit = next((2.0**-k for k in range(24) if 2.0**-k in values), scheme.element.largest)
    return unit, -unit in values
