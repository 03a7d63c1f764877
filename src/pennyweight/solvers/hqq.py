"""HQQ: half-quadratic quantization, which sees no data (Badri & Shaji, "Half-Quadratic Quantization", 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.schemes import Parameters, Scheme, fit_scales
from pennyweight.schemes.fit import parameters_of
from pennyweight.schemes.parameters import spread
from pennyweight.schemes.quantized import grouped
from pennyweight.schemes.rounding import Stored, spread_of, stored_scales, stored_shifts
from pennyweight.schemes.search import Candidate
from pennyweight.solvers.base import Need, Solution, Solver, Statistics
from pennyweight.solvers.nearest import round_to_nearest

# Of the paper: the norm, the weight of the quadratic term and what it grows by, and a bound on the iterations.
POWER, BETA, GROWTH, ITERATIONS = 0.7, 10.0, 1.01, 20

# Weights per chunk: they stay in a core's second-level cache.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class Hqq:
    """min over codes and zero points z of sum_i |w_i - Ŵ_i|**p in each group, p = 0.7, by half-quadratic splitting.

    With an auxiliary error e, codes of values q and the decoded Ŵ, in turns, up to 20 times:

        q = nearest(w / s + z)
        e = shrink(w - Ŵ, beta),   shrink(x) = sign(x) max(|x| - |x|**(p - 1) / beta, 0)
        z = mean over the group of (q - (w - e) / s)
        beta = 1.01 beta, from 10

    Large errors are left to e, so that z serves the many weights. A group stops where its mean |w - Ŵ| no longer falls.
    Offsets are b = mean(s q - (w - e)), and without either the scale is s = sum(q (w - e)) / sum(q q). Each is rounded
    to what is stored before codes are chosen.

    Two things differ from the paper. Errors are shrunk in units of the grid's step, so that weights and their multiples
    are rounded alike; shrunk as they are, those of weights far below 1 are all shrunk to 0, and the method is one step
    of least squares. And it starts from the grid of the smallest and largest weight and from the searched one (see
    fit_scales), and of all that it comes by, starts included, each group keeps what has the lowest sum |w - Ŵ|**0.7.
    Scales or offsets with parents start from the searched grid alone, and its parents stay.
    """

    name: str = "hqq"
    needs: frozenset[Need] = frozenset()

    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics) -> Solution:
        starts = [fit_scales(w, scheme)]
        if w.numel() and starts[0].parents is None and starts[0].offset_parents is None:
            starts.append(fit_scales(w, scheme, fit="minmax"))
        return Solution(round_to_nearest(w, scheme, half_quadratic(w, scheme, starts)))


def half_quadratic(w: Tensor, scheme: Scheme, starts: list[Parameters]) -> Parameters:
    """The best parameters for each group of `w` float [out, in] on the way from each of `starts`, one of them at least.

    Several starts must have no parents. The earlier start wins a tie.
    """
    if w.numel() == 0:
        return starts[0]
    view = grouped(w, scheme)
    scales, shifts = _stored(scheme, starts[0])

    def one(part: slice) -> Candidate:
        rows = view[part].float()
        flat = (rows.shape[0] * rows.shape[1], rows.shape[2])
        own = [None if stored is None else _flat(stored.rows(part), rows.shape) for stored in (scales, shifts)]
        assert own[0] is not None
        groups = _Groups(rows.reshape(flat).contiguous(), scheme, own[0], own[1])
        found = _descended(groups, _candidate(starts[0], scheme, part))
        for start in starts[1:]:
            found = found.or_better(_descended(groups, _candidate(start, scheme, part)))
        return found.candidate

    parts = parallel_map(one, chunks(view.shape[0], max(1, _CHUNK // (view.shape[1] * view.shape[2]))))
    best = Candidate.combined(parts, lambda tensors: torch.cat(tensors).reshape(*view.shape[:2], 1))
    return parameters_of(best, scheme, scales, shifts)


@dataclass(frozen=True)
class _Groups:
    """Groups of weights float32 [n, size], and how their scales and float zero points or offsets [n, 1] are stored."""

    w: Tensor
    scheme: Scheme
    scales: Stored
    shifts: Stored | None

    def at(self, index: Tensor) -> _Groups:
        shifts = None if self.shifts is None else _at(self.shifts, index)
        return _Groups(self.w[index], self.scheme, _at(self.scales, index), shifts)

    def rounded(self, c: Candidate) -> tuple[Tensor, Tensor]:
        """The nearest value of each weight, and the error w - Ŵ as a reader decodes it."""
        kind, is_offset = self.scheme.arithmetic, self.scheme.offset is not None
        x = self.w if c.shifts is None or not is_offset else self.w + c.shifts
        x = x / c.scales
        q = self.scheme.element.nearest(x if c.shifts is None or is_offset else x + c.shifts)
        decoded = q.to(kind)
        if c.shifts is not None and not is_offset:
            decoded = decoded - c.shifts.to(kind)
        decoded = decoded * c.scales.to(kind)
        if c.shifts is not None and is_offset:
            decoded = decoded - c.shifts
        return q, self.w - decoded.float()

    def updated(self, c: Candidate, q: Tensor, error: Tensor, beta: float) -> Candidate:
        """The zero point, offset or scale that is best for values `q` of the weights without the shrunk `error`."""
        step = c.scales * (spread_of(self.scheme) / (2**self.scheme.element.bits - 1))
        w = self.w - shrink(error / step, beta) * step
        if c.shifts is None:
            over = (q * q).sum(-1, keepdim=True)
            best = torch.where(over > 0, (q * w).sum(-1, keepdim=True) / over, c.scales)
            return Candidate(self.scales.nonzero(best), None)
        if self.scheme.offset is not None:
            shifts = (q * c.scales - w).mean(-1, keepdim=True)
        else:
            shifts = (q - w / c.scales).mean(-1, keepdim=True)
        if self.shifts is not None:
            return Candidate(c.scales, self.shifts.nearest(shifts))
        element = self.scheme.element
        return Candidate(c.scales, shifts.round().clamp(element.smallest, element.largest))


def shrink(x: Tensor, beta: float) -> Tensor:
    """sign(x) max(|x| - |x|**(p - 1) / beta, 0)"""
    size = x.abs()
    return x.sign() * (size - size.pow(POWER - 1) / beta).clamp_min(0)


@dataclass(frozen=True)
class _Best:
    """The best candidate of each group so far, and its sum of |w - Ŵ|**p [n, 1]."""

    candidate: Candidate
    error: Tensor

    def or_better(self, other: _Best) -> _Best:
        wins = other.error < self.error
        return _Best(self.candidate.or_where(wins, other.candidate), torch.where(wins, other.error, self.error))


def _descended(groups: _Groups, start: Candidate) -> _Best:
    """The best of `start` and what comes of it; groups that no longer gain take no more part."""
    best = _Best(start, torch.full_like(start.scales, torch.inf))
    current, last, active = start, best.error, torch.arange(groups.w.shape[0], device=groups.w.device)
    beta = BETA
    for iteration in range(ITERATIONS + 1):
        mine = groups.at(active)
        q, error = mine.rounded(current)
        size = error.abs()
        found = _Best(current, size.pow(POWER).sum(-1, keepdim=True))
        best = _put(best, active, _taken(best, active).or_better(found))
        mean = size.mean(-1, keepdim=True)
        going = (mean < last)[:, 0].nonzero()[:, 0]
        if iteration == ITERATIONS or not going.numel():
            break
        current = mine.at(going).updated(_candidate_at(current, going), q[going], error[going], beta)
        active, last, beta = active[going], mean[going], beta * GROWTH
    return best


def _candidate_at(c: Candidate, index: Tensor) -> Candidate:
    return Candidate(c.scales[index], None if c.shifts is None else c.shifts[index])


def _taken(best: _Best, index: Tensor) -> _Best:
    return _Best(_candidate_at(best.candidate, index), best.error[index])


def _put(best: _Best, index: Tensor, part: _Best) -> _Best:
    """`best` with `part` at `index`."""
    put = Candidate.combined((best.candidate, part.candidate), lambda pair: pair[0].index_copy(0, index, pair[1]))
    return _Best(put, best.error.index_copy(0, index, part.error))


def _stored(scheme: Scheme, start: Parameters) -> tuple[Stored, Stored | None]:
    """Scales and shifts under the parents of `start`."""
    scales, shifts = stored_scales(scheme), stored_shifts(scheme)
    return _under(scales, start.parents), None if shifts is None else _under(shifts, start.offset_parents)


def _under(stored: Stored, parents: Tensor | None) -> Stored:
    return stored if parents is None else replace(stored, parents=spread(parents.float(), stored.spec)[..., None])


def _flat(stored: Stored, shape: torch.Size) -> Stored:
    """`stored` [rows, groups, 1] for groups in one line [n, 1]."""
    if stored.parents is None:
        return stored
    return replace(stored, parents=stored.parents.expand(*shape[:2], 1).reshape(-1, 1))


def _at(stored: Stored, index: Tensor) -> Stored:
    return stored if stored.parents is None else replace(stored, parents=stored.parents[index])


def _candidate(start: Parameters, scheme: Scheme, part: slice) -> Candidate:
    decoded = start.decoded(scheme)
    shifts = decoded.zeros if decoded.offsets is None else decoded.offsets
    return Candidate(decoded.scales[part].reshape(-1, 1), None if shifts is None else shifts[part].reshape(-1, 1))


PROVIDES: tuple[Solver, ...] = (Hqq(),)
