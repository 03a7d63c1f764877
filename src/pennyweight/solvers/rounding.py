"""Rounding of targets under a Hessian: with error feedback, on grids fitted anew, polished column by column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import NotPositiveDefiniteError, ShapeError
from pennyweight.core.parallel import parallel_map
from pennyweight.schemes import QuantizedWeight, Scheme, fit_scales
from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Need, Solution, Statistics
from pennyweight.solvers.factor import Factor, factor_of
from pennyweight.solvers.feedback import with_feedback
from pennyweight.solvers.nearest import round_to_nearest
from pennyweight.solvers.ordering import row_parts
from pennyweight.solvers.polish import polished

# The targets of a weight [out, in], under the factor of its Hessian.
Aim = Callable[[Tensor, Factor], Tensor]


@dataclass(frozen=True)
class Rounding:
    """min over codes and grids of tr(E H Eᵀ), E = T - Ŵ, for targets T; row by row, H the damped Hessian.

    Feedback. With H = L D Lᵀ (L unit lower triangular) the objective is the sum over columns j of D_j |(E L)_j|², and
    (E L)_j = E_j + sum over k > j of E_k L_kj. Going from the last column to the first, column j is therefore rounded
    from the aim

        A_j = T_j + sum over k > j of E_k L_kj

    which is all that the columns already rounded leave to correct, and what is left is sum_j D_j |A_j - Ŵ_j|².

    Grids fitted anew, `rounds` times. That sum is what the fit of a grid minimises, for weights A and importance D:
    so the grid is fitted to the aims, the targets are rounded again on it, and each row keeps the better result.
    Only where `fit` is "search".

    Polish, `passes` times. On a fixed grid, given all other columns, the objective is least where column j is nearest
    to Ŵ_j + (E H)_j / H_jj: columns are rounded to that one after the other, which never raises it.

    Columns are rounded by falling importance, each with the scale of the group where it is stored, so the layout never
    changes. `damping` times the mean of H's diagonal is added to it (see factor_of). Sums over finished columns are
    made `block` columns at a time.
    """

    damping: float = 0.01
    block: int = 128
    fit: Fit = "search"
    rounds: int = 0
    passes: int = 0

    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics, *, aim: Aim | None = None) -> Solution:
        """Round what `aim` makes of `w` float [out, in], or `w` itself; `stats` has a Hessian.

        Where the Hessian cannot be factorised `w` is rounded to nearest, and that is noted.
        """
        w = w.float()
        if 0 in w.shape:
            return self._nearest(w, scheme, stats)
        try:
            factor = factor_of(stats, damping=self.damping, block=self.block)
        except NotPositiveDefiniteError as error:
            return self._nearest(w, scheme, stats, f"fell back to nearest: {error}")
        targets = w if aim is None else aim(w, factor)
        return Solution(self._round(targets, scheme, stats, factor), factor.notes)

    def _nearest(self, w: Tensor, scheme: Scheme, stats: Statistics, *notes: str) -> Solution:
        parameters = fit_scales(w, scheme, importance=stats.importance, fit=self.fit)
        return Solution(round_to_nearest(w, scheme, parameters), notes)

    def _round(self, targets: Tensor, scheme: Scheme, stats: Statistics, factor: Factor) -> QuantizedWeight:
        assert stats.hessian is not None
        hessian, importance = stats.hessian, stats.importance
        rounds = self.rounds if self.fit == "search" else 0

        def rows(part: slice) -> QuantizedWeight:
            own = targets[part]
            grid = fit_scales(own, scheme, importance=importance, fit=self.fit)
            found = with_feedback(own, scheme, grid, factor, is_only=rounds == 0)
            for _ in range(rounds):
                anew = fit_scales(found.aims, scheme, importance=variances)
                found = found.or_better(with_feedback(own, scheme, anew, factor))
            weight = found.weight
            for _ in range(self.passes):
                weight = polished(weight, own, hessian, factor.shift)
            return weight

        variances = torch.empty_like(factor.variances)
        variances[factor.order] = factor.variances
        parts = [slice(0, targets.shape[0])] if scheme.rows_share else row_parts(targets.shape[0])
        return QuantizedWeight.join(parallel_map(rows, parts))


def check_statistics(stats: Statistics, needs: frozenset[Need], inputs: int, solver: str) -> None:
    """Raises ShapeError where a statistic that `solver` needs is missing or not [inputs, inputs]."""
    words: dict[Need, str] = {"hessian": "a Hessian", "cross": "a cross moment"}
    for need in sorted(needs):
        given: Tensor | None = getattr(stats, need)
        if given is None or tuple(given.shape) != (inputs, inputs):
            shape = None if given is None else tuple(given.shape)
            raise ShapeError(
                f"{solver} needs {words[need]} of shape {(inputs, inputs)}, not {shape}: calibrate, or use nearest"
            )
