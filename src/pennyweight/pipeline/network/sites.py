"""The codes of one site, from its weight and what calibration found about its inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from pennyweight.core.errors import PennyweightError
from pennyweight.models.network.network import NetworkSite
from pennyweight.pipeline.network.grouped import GroupedRounding
from pennyweight.pipeline.network.moments import Moments
from pennyweight.schemes import PerTensor, QuantizedWeight, Scheme
from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Solution, Solver, Statistics
from pennyweight.solvers.nearest import Nearest, round_to_nearest

# Columns of a group up to which all groups are rounded at once.
_SMALL = 64
# What a scale that a whole embedding shares is multiplied by.
_FACTORS = [1 - 0.04 * step for step in range(20)]


@dataclass(frozen=True)
class SolvedWeight:
    """error, error_nearest   tr(E H Eᵀ) / tr(W H Wᵀ) of the codes, and of rounding to nearest on the same grid; H is
    the identity without data"""

    weight: QuantizedWeight
    error: float
    error_nearest: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SiteSolver:
    """solver  of single matrices; fit  how scales are fitted where a site has to be rounded to nearest"""

    solver: Solver
    fit: Fit = "search"

    def solve(self, site: NetworkSite, w: Tensor, scheme: Scheme, moments: Moments | None) -> SolvedWeight:
        """`w` float32 [out, in] of `site`, finite; without `moments` it is rounded to nearest. Errors name the site."""
        try:
            solution = self._solution(w, scheme, moments)
        except PennyweightError as failure:
            raise type(failure)(f"{site.name}: {failure}") from failure
        return _measured(w, solution, moments)

    def _solution(self, w: Tensor, scheme: Scheme, moments: Moments | None) -> Solution:
        if moments is None or not self.solver.needs:
            importance = None if moments is None else moments.hessian.diagonal(dim1=1, dim2=2).mean(0)
            return Nearest(self.fit).solve(w, scheme, Statistics(diagonal=importance))
        groups, inputs = moments.hessian.shape[:2]
        if groups == 1:
            return self.solver.solve(w, scheme, moments.of_group(0))
        if scheme.is_plain and (inputs <= _SMALL or scheme.rows_share):
            return Solution(GroupedRounding().solve(w, scheme, moments))
        if scheme.rows_share:
            return replace(
                Nearest(self.fit).solve(w, scheme, Statistics()),
                notes=("rounded to nearest: its groups share a scale",),
            )
        rows = w.shape[0] // groups
        parts = [self.solver.solve(w[g * rows : (g + 1) * rows], scheme, moments.of_group(g)) for g in range(groups)]
        notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        return Solution(QuantizedWeight.join([part.weight for part in parts]), notes)

    def of_embedding(self, w: Tensor, scheme: Scheme, counts: Tensor) -> SolvedWeight:
        """Codes of an embedding `w` [tokens, width], nearest; `counts` float [tokens], how often each token is read.

        Rows that have scales of their own are rounded by themselves, whatever the counts. One scale for all is the
        multiple of the fitted one with the least sum of count |row error|²; tokens that were never read count a little.
        """
        weight = Nearest(self.fit).solve(w, scheme, Statistics()).weight
        if isinstance(scheme.granularity, PerTensor) and scheme.is_plain and self.fit == "search":
            # A token that calibration never read may still come.
            weight = _best_scaled(w, weight, counts.double() + counts.double().mean().clamp_min(1) / 100)
        return _measured(w, Solution(weight), None)


def _measured(w: Tensor, solution: Solution, moments: Moments | None) -> SolvedWeight:
    weight = solution.weight
    nearest = round_to_nearest(w, weight.scheme, weight.parameters)
    total, error, of_nearest = (_energy(e, moments) for e in (w, w - weight.dequantize(), w - nearest.dequantize()))
    if not total:
        return SolvedWeight(weight, 0.0, 0.0, solution.notes)
    return SolvedWeight(weight, error / total, of_nearest / total, solution.notes)


def _energy(e: Tensor, moments: Moments | None) -> float:
    """The sum over groups of tr(E H Eᵀ); |E|² without data."""
    if moments is None:
        return float(e.double().square().sum())
    groups, inputs = moments.hessian.shape[:2]
    parts = e.view(groups, -1, inputs)
    return float(((parts @ moments.hessian) * parts).double().sum())


def _best_scaled(w: Tensor, weight: QuantizedWeight, shares: Tensor) -> QuantizedWeight:
    """Nearest codes with the multiple of the one scale that has the least sum over rows of share |row error|²."""

    def trial(factor: float) -> tuple[float, QuantizedWeight]:
        scaled = replace(weight.parameters, scales=(weight.scales.float() * factor).to(weight.scales.dtype))
        found = round_to_nearest(w, weight.scheme, scaled)
        return float(((w - found.dequantize()).double().square().sum(1) * shares).sum()), found

    return min((trial(factor) for factor in _FACTORS), key=lambda pair: pair[0])[1]
