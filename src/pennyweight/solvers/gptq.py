"""GPTQ: rounding that corrects, in the columns still to come, for the error already made.

Frantar et al., "GPTQ" (2022), in the form of LDLQ (Chee et al., "QuIP", 2023), which is the same algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import NotPositiveDefiniteError, ShapeError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.schemes import PerTensor, QuantizedWeight, Scheme, fit_scales
from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Solution, Solver, Statistics
from pennyweight.solvers.factorize import cholesky
from pennyweight.solvers.nearest import round_to_nearest

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
    needs_hessian: bool = True

    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics) -> Solution:
        """Raises ShapeError where `stats` has no Hessian [in, in]."""
        if stats.hessian is None or tuple(stats.hessian.shape) != (w.shape[1], w.shape[1]):
            given = None if stats.hessian is None else tuple(stats.hessian.shape)
            raise ShapeError(
                f"gptq needs a Hessian of shape {(w.shape[1],) * 2}, not {given}: calibrate, or use nearest"
            )
        w = w.float()
        scales, zeros = fit_scales(w, scheme, importance=stats.importance, fit=self.fit)
        if 0 in w.shape:
            return Solution(round_to_nearest(w, scheme, scales, zeros))
        try:
            order, lower, notes = self._factorize(stats.hessian)
        except NotPositiveDefiniteError as error:
            return Solution(round_to_nearest(w, scheme, scales, zeros), (f"fell back to nearest: {error}",))
        codes = _round_with_feedback(w, scheme, scales, zeros, order=order, lower=lower, block=self.block)
        return Solution(QuantizedWeight(codes, scales, zeros, scheme), notes)

    def _factorize(self, hessian: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Column order (last is rounded first) and unit lower L of the damped Hessian in that order."""
        diagonal = hessian.diagonal()
        # Stable, so that equal importances keep the same order everywhere.
        order = torch.argsort(diagonal, stable=True)
        mean = diagonal.mean()
        for attempt in range(4):
            damping = self.damping * 10**attempt
            damped = hessian[order][:, order]
            dead = damped.diagonal() <= 0
            damped.diagonal().add_(damping * mean).masked_fill_(dead, 1.0)
            try:
                lower = cholesky(damped)
            except NotPositiveDefiniteError:
                continue
            notes = () if attempt == 0 else (f"damping raised from {self.damping:g} to {damping:g}",)
            return order, lower.div_(lower.diagonal().clone()), notes
        raise NotPositiveDefiniteError(f"the Hessian could not be factorised with damping up to {damping:g}")


def _round_with_feedback(
    w: Tensor, scheme: Scheme, scales: Tensor, zeros: Tensor | None, *, order: Tensor, lower: Tensor, block: int
) -> Tensor:
    """Codes uint8 [out, in]; see Gptq. `lower` is in the order of `order`."""
    blocks = chunks(w.shape[1], block)[::-1]
    # What a block of errors adds to the targets of all columns before it: L[block, before] transposed, contiguous.
    panels = [lower[columns, : columns.start].T.contiguous() for columns in blocks]
    groups = (order // scheme.group_size(w.shape[1])).tolist()

    def rows(part: slice) -> Tensor:
        shared = slice(0, 1) if isinstance(scheme.granularity, PerTensor) else part
        column = _Columns(scheme, scales[shared], None if zeros is None else zeros[shared], groups)
        values = _solve_rows(w[part].T[order].contiguous(), column, lower=lower, blocks=blocks, panels=panels)
        codes = torch.empty(values.shape, dtype=torch.uint8, device=w.device)
        codes[order] = scheme.element.encode(values)
        return codes.T

    return torch.cat(parallel_map(rows, chunks(w.shape[0], _ROWS)))


class _Columns:
    """Rounds one column at a time with the scales of its group, decoding as the reader will."""

    def __init__(self, scheme: Scheme, scales: Tensor, zeros: Tensor | None, groups: list[int]) -> None:
        self._element = scheme.element
        self._scales = scales.float().T.contiguous()
        self._zeros = None if zeros is None else zeros.float().T.contiguous()
        self._stored = scales.dtype
        self._groups = groups

    def round(self, target: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """Values of the format and decoded weights, float32 [rows], for column `j` of the solving order."""
        scale = self._scales[self._groups[j]]
        values = target / scale
        if self._zeros is None:
            values = self._element.nearest(values)
            decoded = values * scale
        else:
            zero = self._zeros[self._groups[j]]
            values = self._element.nearest(values.add_(zero))
            decoded = (values - zero).mul_(scale)
        return values, decoded if self._stored == torch.float32 else decoded.to(self._stored).float()


def _solve_rows(w: Tensor, column: _Columns, *, lower: Tensor, blocks: list[slice], panels: list[Tensor]) -> Tensor:
    """Values of the number format for the transposed weight `w` [in, rows], columns in solving order."""
    targets, values = w.clone(), torch.empty_like(w)
    for columns, panel in zip(blocks, panels, strict=True):
        errors = torch.empty_like(w[columns])
        for j in range(columns.stop - 1, columns.start - 1, -1):
            values[j], decoded = column.round(targets[j], j)
            error = torch.sub(w[j], decoded, out=errors[j - columns.start])
            targets[columns.start : j].addr_(lower[j, columns.start : j], error)
        if columns.start:
            targets[: columns.start] += matmul_nt(panel, errors.T.contiguous())
    return values


PROVIDES: tuple[Solver, ...] = (Gptq(),)
