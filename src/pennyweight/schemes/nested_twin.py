"""The search of offsets, and of scales and offsets that are codes together with the parents that they share.

    min over scales s_g = D a_g and offsets o_g = M b_g of   sum_g sum_i h_i (s_g v_i - o_g - w_i)**2

with v_i the value nearest to (w_i + o_g) / s_g, a and b codes and D and M their parents, all as they are stored.
Given the codes v the error is a quadratic in s and o, which a few sums (`Moments`) describe. The search

1. goes through a grid of ranges for each group and solves for s and o freely,
2. estimates for many parents what rounding these to their grid costs, and tries the best on the weights,
3. tries neighbouring codes of scales and offsets on the weights,
4. solves for D and M, given all codes, and goes on from 3 until nothing gains.

Floats count as codes that are their own parents. Every span keeps the best of all that was tried, min-max included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from pennyweight.schemes.rounding import Stored, rounded_parents, spread_of
from pennyweight.schemes.search import Candidate, Groups

# Bounds on what nearly always ends earlier, because no span gains any more.
_FREE_STEPS, _ROUNDS = 2, 3


@dataclass(frozen=True)
class Effort:
    """What is tried.

    factors   [1] of the range, or [2] of its ends where an offset places it
    shares    of the largest number of a span, what its largest code may stand for
    span      how many groups are decided on together
    parents   how many parents of scales are tried on the weights, of all whose error is estimated
    reach     how many codes on either side of a scale are
    is_thorough   whether the grid of factors is gone through again on the grid of the parents
    """

    factors: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    span: int
    parents: int
    reach: int
    is_thorough: bool


@dataclass(frozen=True)
class Nested:
    """The best parameters, how they are stored: with the parents that were found, and whether a group may be of one
    value."""

    candidate: Candidate
    scales: Stored
    shifts: Stored | None
    has_constants: bool


@dataclass(frozen=True)
class _Moments:
    """sum h v, sum h v v and sum h v (w - mean) with v the values of the codes, [rows, groups, 1]."""

    v: Tensor
    vv: Tensor
    vw: Tensor


@dataclass(frozen=True)
class _Fit:
    """Decoded scales and offsets on the grid of their parents, all [rows, groups, 1]; a float has the parent 1."""

    scales: Tensor
    offsets: Tensor
    parents: Tensor
    offset_parents: Tensor
    sums: _Moments
    error: Tensor

    def or_where(self, wins: Tensor, other: _Fit) -> _Fit:
        def chosen(one: Tensor, two: Tensor) -> Tensor:
            return torch.where(wins, one, two)

        sums = _Moments(*(chosen(getattr(other.sums, n), getattr(self.sums, n)) for n in ("v", "vv", "vw")))
        names = ("scales", "offsets", "parents", "offset_parents")
        one, two, three, four = (chosen(getattr(other, n), getattr(self, n)) for n in names)
        return _Fit(one, two, three, four, sums, chosen(other.error, self.error))


def search_nested_plainly(groups: Groups, effort: Effort) -> Nested:
    """The best scales, offsets and parents for groups whose `scales` and `shifts` have no parents yet."""
    search = _Search.of(groups, effort)
    best = search.searched(search.ranged(), 0.0 if search.has_both_sides else 1.0)
    if not search.has_both_sides and groups.scheme.offset is not None and groups.scheme.offset.parent is not None:
        # Where weights of a group lie above zero, offsets below it may serve.
        above = search.of_span(groups.w.amin(-1, keepdim=True), "amax") > 0
        if above.any():
            best = search.better(best, search.searched(best, -1.0), above)
    shifts = (
        None if groups.shifts is None else replace(groups.shifts, parents=_kept(groups.shifts, best.offset_parents))
    )
    found = Candidate(best.scales, None if shifts is None else best.offsets)
    return Nested(found, replace(groups.scales, parents=_kept(groups.scales, best.parents)), shifts, has_constants=True)


def _kept(stored: Stored, parents: Tensor) -> Tensor | None:
    return None if stored.spec.parent is None else parents


@dataclass(frozen=True)
class _Search:
    """Sums that every candidate needs: `mean` of w where there are offsets, `ones` = sum h."""

    g: Groups
    effort: Effort
    mean: Tensor
    ones: Tensor

    @staticmethod
    def of(groups: Groups, effort: Effort) -> _Search:
        ones = groups.sum(torch.ones_like(groups.w))
        mean = torch.zeros_like(ones) if groups.shifts is None else groups.sum(groups.w.clone()) / ones
        return _Search(groups, effort, mean, ones)

    @property
    def has_both_sides(self) -> bool:
        return self.g.shifts is None or self.g.shifts.is_signed

    def of_span(self, x: Tensor, how: Literal["sum", "amax"] = "sum") -> Tensor:
        """Sums (or maxima) over each span, in each of its groups."""
        x = x.reshape(x.shape[0], -1, self.effort.span)
        spans = x.sum(-1) if how == "sum" else x.amax(-1)
        return spans.repeat_interleave(self.effort.span, dim=1)[..., None]

    def moments(self, values: Tensor) -> _Moments:
        g = self.g
        centred = values * (g.w if g.shifts is None else g.w - self.mean)
        return _Moments(g.sum(values.clone()), g.sum(values * values), g.sum(centred))

    def free_moments(self, inverse: Tensor, shift: Tensor) -> _Moments:
        """Of the values nearest to (w - mean) * inverse + shift."""
        return self.moments(self.g.scheme.element.nearest((self.g.w - self.mean) * inverse + shift))

    def tried(self, scales: Tensor, offsets: Tensor, parents: Tensor, offset_parents: Tensor) -> _Fit:
        c = Candidate(scales, None if self.g.shifts is None else offsets)
        return _Fit(scales, offsets, parents, offset_parents, self.moments(self.g.quantized(c)), self.g.error(c))

    def scale(self, wanted: Tensor, parents: Tensor) -> Tensor:
        stored = self.g.scales
        return (stored if stored.spec.parent is None else replace(stored, parents=parents)).nonzero(wanted)

    def offset(self, wanted: Tensor, parents: Tensor) -> Tensor:
        stored = self.g.shifts
        if stored is None:
            return torch.zeros_like(wanted)
        return (stored if stored.spec.parent is None else replace(stored, parents=parents)).nearest(wanted)

    def parent(self, stored: Stored | None, wanted: Tensor) -> Tensor:
        if stored is None or stored.spec.parent is None:
            return torch.ones_like(wanted)
        return rounded_parents(wanted, stored.spec).float()

    def largest(self, stored: Stored | None) -> float:
        return 1.0 if stored is None or stored.spec.element is None else stored.spec.element.largest

    def ranged(self) -> _Fit:
        """The smallest scale that reaches both ends of the range, and the offset that places it."""
        g, element = self.g, self.g.scheme.element
        low, high = g.w.amin(-1, keepdim=True), g.w.amax(-1, keepdim=True)
        if g.shifts is not None:
            if not self.has_both_sides:
                low, high = low.clamp_max(0), high.clamp_min(0)
            scale = (high - low) / spread_of(g.scheme)
        elif element.smallest < 0:
            scale = torch.maximum(high / element.largest, low / element.smallest)
        else:
            scale = torch.where(-low > high, low, high) / element.largest
        parents = self.parent(g.scales, self.of_span(scale.abs(), "amax") / self.largest(g.scales))
        offset = element.smallest * scale - low
        offset_parents = self.parent(g.shifts, self.of_span(offset.abs(), "amax") / self.largest(g.shifts))
        scale = self.scale(scale, parents)
        return self.tried(scale, self.offset(element.smallest * scale - low, offset_parents), parents, offset_parents)

    def curvature(self, m: _Moments) -> Tensor:
        """How much the error rises with the square of a change of scale, offsets following it."""
        return m.vv if self.g.shifts is None else m.vv - m.v * m.v / self.ones

    def points(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The inverse scale and the shift of each point of the grid of ranges."""
        g, element = self.g, self.g.scheme.element
        low, high = g.w.amin(-1, keepdim=True), g.w.amax(-1, keepdim=True)
        if g.shifts is None:
            extreme = torch.where(-low >= high, low, high)
            full = (element.smallest if element.smallest < 0 else element.largest) / extreme
            for (factor,) in self.effort.factors:
                yield full / factor, torch.zeros_like(full)
            return
        half, centre = (high - low) / 2, (high + low) / 2 - self.mean
        for below, above in self.effort.factors:
            inverse = spread_of(g.scheme) / half / (below + above)
            at = centre + half * ((above - below) / 2)
            yield inverse, (element.largest + element.smallest) / 2 - at * inverse

    def explored(self, first: _Fit, side: float) -> tuple[Tensor, _Moments]:
        """The best of the grid with the least squares of its codes, offsets on `side` of zero (0: on both): scales and
        moments."""
        found = (first.scales, first.offsets, torch.full_like(first.scales, -torch.inf), first.sums)
        for inverse, shift in self.points():
            found = self.freely_better(found, self.free_moments(inverse, shift), side)
        for _ in range(_FREE_STEPS):
            scale, offset, _, _ = found
            found = self.freely_better(found, self.free_moments(1 / scale, (offset + self.mean) / scale), side)
        return found[0], found[3]

    def freely_better(
        self, best: tuple[Tensor, Tensor, Tensor, _Moments], m: _Moments, side: float
    ) -> tuple[Tensor, Tensor, Tensor, _Moments]:
        over = self.curvature(m)
        scale = m.vw / over
        gain, offset = m.vw * scale, torch.zeros_like(scale)
        if self.g.shifts is not None:
            offset = scale * m.v / self.ones - self.mean
            # On the wrong side: 0, and the scale that is best beside it.
            outside, raw = offset * side < 0, m.vw + self.mean * m.v
            alone = raw / m.vv
            loss = alone * (alone * m.vv - 2 * raw) + self.mean * self.mean * self.ones
            scale, gain = torch.where(outside, alone, scale), torch.where(outside, -loss, gain)
            offset = torch.where(outside, 0.0, offset)
        wins = (over > 0) & (gain > best[2])
        if not self.g.scales.is_signed:
            wins &= scale > 0
        pairs = ((scale, best[0]), (offset, best[1]), (gain, best[2]))
        one, two, three = (torch.where(wins, new, old) for new, old in pairs)
        v, vv, vw = (torch.where(wins, getattr(m, n), getattr(best[3], n)) for n in ("v", "vv", "vw"))
        return one, two, three, _Moments(v, vv, vw)

    def scale_parents(self, scale: Tensor, m: _Moments) -> list[Tensor]:
        """The parents whose rounding of scales costs least, as estimated for codes that stay; best first."""
        stored, element = self.g.scales, self.g.scales.spec.element
        if element is None:
            return [torch.ones_like(scale)]
        peak, weight = self.of_span(scale.abs(), "amax"), self.curvature(m)
        ends = (element.largest, element.smallest) if element.smallest < 0 else (element.largest,)
        tried = torch.stack([peak * (share / end) for end in ends for share in self.effort.shares])
        costs = [self.of_span(weight * (replace(stored, parents=p).nonzero(scale) - scale).square()) for p in tried]
        order = torch.stack(costs).nan_to_num(torch.inf).argsort(dim=0, stable=True)[: self.effort.parents]
        return [self.parent(stored, p) for p in tried.gather(0, order)]

    def offset_of(self, scale: Tensor, m: _Moments) -> Tensor:
        """The offset that is best beside a scale."""
        return scale * m.v / self.ones - self.mean

    def offset_parent(self, offset: Tensor, side: float) -> Tensor:
        stored = self.g.shifts
        if stored is None or stored.spec.parent is None:
            return torch.ones_like(offset)
        side = side or 1.0
        peak = self.of_span(offset.abs() if self.has_both_sides else offset * side, "amax")
        tried = torch.stack([peak * (side * share / self.largest(stored)) for share in self.effort.shares])
        costs = [
            self.of_span(self.ones * (replace(stored, parents=p).nearest(offset) - offset).square()) for p in tried
        ]
        best = torch.stack(costs).nan_to_num(torch.inf).argmin(0, keepdim=True)
        return self.parent(stored, tried.gather(0, best)[0])

    def placed(self, scale: Tensor, m: _Moments, parents: Tensor, offset_parents: Tensor) -> _Fit:
        scale = self.scale(scale, parents)
        return self.tried(scale, self.offset(self.offset_of(scale, m), offset_parents), parents, offset_parents)

    def again(self, best: _Fit) -> _Fit:
        """The points of the grid of ranges once more, on the grid of these parents."""
        for inverse, shift in self.points():
            m = self.free_moments(inverse, shift)
            best = self.group_better(best, self.placed(m.vw / self.curvature(m), m, best.parents, best.offset_parents))
        return best

    def moved(self, best: _Fit) -> _Fit:
        """The best of `best` and its neighbours on the grid."""
        if self.g.scales.spec.parent is None:
            return best
        for by in range(self.effort.reach, -self.effort.reach - 1, -1):
            wanted = self.scale(best.scales + by * best.parents, best.parents)
            scale = torch.where((best.scales + by * best.parents).abs() < best.parents.abs() / 2, best.scales, wanted)
            offset = self.offset(self.offset_of(scale, best.sums), best.offset_parents)
            best = self.group_better(best, self.tried(scale, offset, best.parents, best.offset_parents))
        for by in (1, -1) if self.g.shifts is not None and self.g.shifts.spec.parent is not None else ():
            offset = self.offset(best.offsets + by * best.offset_parents, best.offset_parents)
            best = self.group_better(best, self.tried(best.scales, offset, best.parents, best.offset_parents))
        return best

    def refitted(self, f: _Fit) -> _Fit:
        """The parents that are best for the codes of weights, scales and offsets:

        | sum a a vv   -sum a b v |  | D |   |  sum a (vw + mean v) |
        | -sum a b v    sum b b h |  | M | = | -sum b mean h        |
        """
        m, a, b = f.sums, f.scales / f.parents, f.offsets / f.offset_parents
        aa, aw = self.of_span(a * a * m.vv), self.of_span(a * (m.vw + self.mean * m.v))
        ab, bb, bw = (self.of_span(x) for x in (a * b * m.v, b * b * self.ones, b * self.mean * self.ones))
        determinant = aa * bb - ab * ab
        wanted = torch.where(determinant > 0, (aw * bb - bw * ab) / determinant, aw / aa)
        parents = self.parent(self.g.scales, torch.where(wanted.abs() > 0, wanted, f.parents))
        wanted = torch.where(bb > 0, (parents * ab - bw) / bb, f.offset_parents)
        over = self.curvature(m)
        return self.placed(torch.where(over > 0, m.vw / over, f.scales), m, parents, self.parent(self.g.shifts, wanted))

    def group_better(self, best: _Fit, other: _Fit) -> _Fit:
        return best.or_where(other.error < best.error, other)

    def better(self, best: _Fit, other: _Fit, allowed: Tensor | None = None) -> _Fit:
        """`other` in the spans where its error is less."""
        wins = self.of_span(other.error) < self.of_span(best.error)
        return best.or_where(wins if allowed is None else wins & allowed, other)

    def searched(self, first: _Fit, side: float) -> _Fit:
        scale, m = self.explored(first, side)
        found = None
        for parents in self.scale_parents(scale, m):
            offset_parents = self.offset_parent(self.offset_of(self.scale(scale, parents), m), side)
            tried = self.moved(self.placed(scale, m, parents, offset_parents))
            found = tried if found is None else self.better(found, tried)
        assert found is not None
        if self.effort.is_thorough and self.g.scales.spec.parent is not None:
            found = self.again(found)
        for _ in range(_ROUNDS):
            better = self.better(found, self.moved(self.refitted(found)))
            if torch.equal(better.error, found.error):
                break
            found = better
        return self.better(first, found)
