"""The factor of a damped Hessian, in the order in which columns are rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import NotPositiveDefiniteError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.factorize import cholesky_
from pennyweight.solvers.ordering import permuted, row_parts

_ATTEMPTS = 4


@dataclass(frozen=True)
class Factor:
    """H + shift = L D Lᵀ with L unit lower triangular, cut into blocks of columns, last block first.

    Columns stand in solving order: by rising importance, because the last one is rounded first.

    order       int64 [in]: the column of the weight at each position of the solving order
    shift       float32 [in]: what was added to the Hessian's diagonal, in the order of the weight
    variances   float32 [in]: D, what the columns rounded later cannot explain of each column
    blocks      the positions of each block
    within      L[block, block]
    before      L[block, positions before it] transposed and contiguous: what its errors add to their targets
    """

    order: Tensor
    shift: Tensor
    variances: Tensor
    blocks: list[slice]
    within: list[Tensor]
    before: list[Tensor]
    notes: tuple[str, ...]

    @staticmethod
    def of(lower: Tensor, order: Tensor, shift: Tensor, *, block: int, notes: tuple[str, ...] = ()) -> Factor:
        """Of the Cholesky factor `lower` [in, in], whose memory is used up."""
        roots = lower.diagonal().clone()
        blocks = chunks(lower.shape[0], block)[::-1]

        def cut(part: slice) -> tuple[Tensor, Tensor]:
            rows = lower[part, : part.stop].div_(roots[: part.stop])
            return rows[:, part.start :].contiguous(), rows[:, : part.start].T.contiguous()

        pieces = parallel_map(cut, blocks)
        within, before = [piece[0] for piece in pieces], [piece[1] for piece in pieces]
        return Factor(order, shift, roots.square_(), blocks, within, before, notes)

    def forward(self, b: Tensor) -> Tensor:
        """L⁻¹ b for float32 `b` [in, n], positions in solving order."""
        x = b.clone()
        for part, within, before in zip(self.blocks[::-1], self.within[::-1], self.before[::-1], strict=True):
            if part.start:
                x[part] -= matmul_nt(before.T.contiguous(), x[: part.start].T.contiguous())
            x[part] = torch.linalg.solve_triangular(within, x[part], upper=False, unitriangular=True)
        return x

    def backward(self, b: Tensor) -> Tensor:
        """L⁻ᵀ b for float32 `b` [in, n], positions in solving order."""
        x = b.clone()
        for part, within, before in zip(self.blocks, self.within, self.before, strict=True):
            x[part] = torch.linalg.solve_triangular(within.T, x[part], upper=True, unitriangular=True)
            if part.start:
                x[: part.start] -= matmul_nt(before, x[part].T.contiguous())
        return x

    def corrected(self, w: Tensor, inner: Callable[[Tensor], Tensor], *, share: float) -> Tensor:
        """W + share (inner(W)ᵀ D⁻¹) L⁻¹ for float32 `w` [out, in].

        `inner` gives float32 [in, rows], positions in solving order, for some rows of `w`; the result is used up.
        """

        def rows(part: slice) -> Tensor:
            step = self.backward(inner(w[part]).div_(self.variances[:, None]))
            targets = w[part].clone()
            targets[:, self.order] += share * step.T
            return targets

        return torch.cat(parallel_map(rows, row_parts(w.shape[0])))


def factor_of(stats: Statistics, *, damping: float, block: int) -> Factor:
    """The factor of the Hessian of `stats` with `damping` times the mean of its diagonal added to that; made once.

    Where it fails the damping is raised tenfold, up to three times, and that is noted. Columns that calibration never
    lit get a diagonal of 1: nothing reaches them, and they reach nothing. Raises NotPositiveDefiniteError.
    """
    return stats.remember(("factor", damping, block), lambda: _factorize(stats, damping, block))


def _factorize(stats: Statistics, asked: float, block: int) -> Factor:
    assert stats.hessian is not None
    diagonal = stats.hessian.diagonal()
    # Stable, so that equal importances keep the same order everywhere.
    order = torch.argsort(diagonal, stable=True)
    mean = diagonal.mean()
    for attempt in range(_ATTEMPTS):
        damping = asked * 10**attempt
        shift = torch.where(diagonal <= 0, 1.0 - diagonal, damping * mean)
        damped = permuted(stats.hessian, order)
        dead = damped.diagonal() <= 0
        damped.diagonal().add_(damping * mean).masked_fill_(dead, 1.0)
        try:
            lower = cholesky_(damped)
        except NotPositiveDefiniteError:
            continue
        notes = () if attempt == 0 else (f"damping raised from {asked:g} to {damping:g}",)
        return Factor.of(lower, order, shift, block=block, notes=notes)
    raise NotPositiveDefiniteError(f"the Hessian could not be factorised with damping up to {damping:g}")
