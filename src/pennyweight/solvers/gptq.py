"""GPTQ: rounding that corrects, in the columns still to come, for the error already made.

Frantar et al., "GPTQ" (2022), in the form of LDLQ (Chee et al., "QuIP", 2023), which is the same algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import NotPositiveDefiniteError, ShapeError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.feedback import Grid, round_block_
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.schemes import Parameters, QuantizedWeight, Scheme, fit_scales
from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Need, Solution, Solver, Statistics
from pennyweight.solvers.factorize import cholesky_
from pennyweight.solvers.nearest import round_to_nearest
from pennyweight.solvers.ordering import columns_first, permuted, rows_first

# Rows solved together by one thread.
_ROWS = 1024


@dataclass(frozen=True)
class Gptq:
    """min over codes of tr(E H Eᵀ), E = W - Ŵ, column by column.

    With H = L D Lᵀ (L unit lower triangular) the objective is the sum over columns j of D_j |(E L)_j|², and
    (E L)_j = E_j + sum over k > j of E_k L_kj. Going from the last column to the first, column j is therefore
    rounded from the target

        T_j = W_j + sum over k > j of E_k L_kj

    which is all that the columns already rounded leave to correct. Columns are taken by falling importance (the
    Hessian's diagonal), each with the scale of the group where it is stored, so the layout never changes. Scales are
    fitted first (`fit`), weighted by importance, and stay. Sums over finished columns are made `block` columns at a
    time. Columns that calibration never lit are rounded to nearest. `damping` times the mean of the diagonal is
    added to it; where the factorisation fails it is raised tenfold, up to three times, and that is noted; after that
    the weight is rounded to nearest, and that is noted.
    """

    damping: float = 0.01
    block: int = 128
    fit: Fit = "search"
    name: str = "gptq"
    needs: frozenset[Need] = frozenset({"hessian"})

    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics) -> Solution:
        """Raises ShapeError where `stats` has no Hessian [in, in]."""
        if stats.hessian is None or tuple(stats.hessian.shape) != (w.shape[1], w.shape[1]):
            given = None if stats.hessian is None else tuple(stats.hessian.shape)
            raise ShapeError(
                f"gptq needs a Hessian of shape {(w.shape[1],) * 2}, not {given}: calibrate, or use nearest"
            )
        w = w.float()
        parameters = fit_scales(w, scheme, importance=stats.importance, fit=self.fit)
        if 0 in w.shape:
            return Solution(round_to_nearest(w, scheme, parameters))
        try:
            factor = stats.remember(("gptq", self.damping, self.block), lambda: self._factorize(stats))
        except NotPositiveDefiniteError as error:
            return Solution(round_to_nearest(w, scheme, parameters), (f"fell back to nearest: {error}",))
        codes = _round_with_feedback(w, scheme, parameters, factor)
        return Solution(QuantizedWeight.of(codes, parameters, scheme), factor.notes)

    def _factorize(self, stats: Statistics) -> Factor:
        assert stats.hessian is not None
        diagonal = stats.hessian.diagonal()
        # Stable, so that equal importances keep the same order everywhere.
        order = torch.argsort(diagonal, stable=True)
        mean = diagonal.mean()
        for attempt in range(4):
            damping = self.damping * 10**attempt
            damped = permuted(stats.hessian, order)
            dead = damped.diagonal() <= 0
            damped.diagonal().add_(damping * mean).masked_fill_(dead, 1.0)
            try:
                lower = cholesky_(damped)
            except NotPositiveDefiniteError:
                continue
            notes = () if attempt == 0 else (f"damping raised from {self.damping:g} to {damping:g}",)
            return Factor.of(lower.div_(lower.diagonal().clone()), order, block=self.block, notes=notes)
        raise NotPositiveDefiniteError(f"the Hessian could not be factorised with damping up to {damping:g}")


@dataclass(frozen=True)
class Factor:
    """The unit lower factor L of a damped Hessian in solving order, cut into blocks of columns, last block first.

    order       int64 [in]: the column of the weight at each position of the solving order
    blocks      the positions of each block
    within      L[block, block]
    before      L[block, positions before it] transposed and contiguous: what its errors add to their targets
    """

    order: Tensor
    blocks: list[slice]
    within: list[Tensor]
    before: list[Tensor]
    notes: tuple[str, ...]

    @staticmethod
    def of(lower: Tensor, order: Tensor, *, block: int, notes: tuple[str, ...] = ()) -> Factor:
        blocks = chunks(lower.shape[0], block)[::-1]
        within = [lower[part, part].contiguous() for part in blocks]
        before = [lower[part, : part.start].T.contiguous() for part in blocks]
        return Factor(order, blocks, within, before, notes)


def _round_with_feedback(w: Tensor, scheme: Scheme, parameters: Parameters, factor: Factor) -> Tensor:
    """Codes uint8 [out, in]; see Gptq."""
    groups = factor.order // scheme.group_size(w.shape[1])

    def rows(part: slice) -> Tensor:
        given = parameters.rows(part, scheme).decoded(scheme)
        scales, zeros, offsets = (
            _by_group(x, part.stop - part.start) for x in (given.scales, given.zeros, given.offsets)
        )
        assert scales is not None
        grid = Grid(scheme.element, scales, zeros, scheme.arithmetic, offsets)
        values = _solve_rows(columns_first(w[part], factor.order), grid, groups, factor)
        return rows_first(scheme.element.encode(values), factor.order)

    return torch.cat(parallel_map(rows, chunks(w.shape[0], _ROWS))).contiguous()


def _by_group(parameters: Tensor | None, rows: int) -> Tensor | None:
    """Scales, zeros or offsets [rows or 1, groups] as [groups, rows]."""
    return None if parameters is None else parameters.T.expand(-1, rows).contiguous()


def _solve_rows(w: Tensor, grid: Grid, groups: Tensor, factor: Factor) -> Tensor:
    """Values of the number format for the transposed weight `w` [in, rows], columns in solving order."""
    targets, values = w.clone(), torch.empty_like(w)
    for part, within, before in zip(factor.blocks, factor.within, factor.before, strict=True):
        errors = torch.empty_like(w[part])
        round_block_(targets[part], w[part], values[part], errors, lower=within, grid=grid, groups=groups[part])
        if part.start:
            targets[: part.start] += matmul_nt(before, errors.T.contiguous())
    return values


PROVIDES: tuple[Solver, ...] = (Gptq(),)
