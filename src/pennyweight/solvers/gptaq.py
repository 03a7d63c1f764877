"""GPTAQ: GPTQ whose columns to come also make up for what the quantized blocks before did to the input.

Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.schemes import Scheme
from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Need, Solution, Solver, Statistics
from pennyweight.solvers.factor import Factor
from pennyweight.solvers.ordering import permuted
from pennyweight.solvers.rounding import Rounding, check_statistics

# Columns that one thread computes together.
_COLUMNS = 1024


@dataclass(frozen=True)
class Gptaq:
    """min over codes of |W X̃ - Ŵ X|², with each column's part of W (X̃ - X) made up for by the columns after it alone.

    With Δ = (X̃ - X) Xᵀ / tokens = G - H, what column j loses, W_j (x̃_j - x_j), is the least-squares change

        P_jk = alpha (Δ_j R_j⁻¹)_k for the columns k rounded after j, R_j the Hessian of these alone

    so T = W (I + P) is the target of Rounding. With H = L D Lᵀ, R_j is a leading block of it in solving order, and
    P = alpha M D⁻¹ L⁻¹ with M the strictly lower part of Δ L⁻ᵀ. The paper's code takes alpha = 1/4, and for
    W_j the column as feedback has left it; here it is the weight itself, as in the objective.
    """

    damping: float = 0.01
    block: int = 128
    fit: Fit = "search"
    rounds: int = 0
    passes: int = 0
    alpha: float = 0.25
    name: str = "gptaq"
    needs: frozenset[Need] = frozenset({"hessian", "cross"})

    def solve(self, w: Tensor, scheme: Scheme, stats: Statistics) -> Solution:
        """Raises ShapeError where `stats` has no Hessian or no cross moment [in, in]."""
        check_statistics(stats, self.needs, w.shape[1], self.name)
        rounding = Rounding(self.damping, self.block, self.fit, self.rounds, self.passes)
        return rounding.solve(w, scheme, stats, aim=lambda w, factor: self._targets(w, stats, factor))

    def _targets(self, w: Tensor, stats: Statistics, factor: Factor) -> Tensor:
        """W + alpha ((W M) D⁻¹) L⁻¹."""
        key = ("gptaq", self.damping, self.block)
        mixing = stats.remember(key, lambda: _mixing(stats, factor))

        def passed_on(rows: Tensor) -> Tensor:
            return matmul_nt(mixing, rows[:, factor.order].contiguous())

        return factor.corrected(w, passed_on, share=self.alpha)


def _mixing(stats: Statistics, factor: Factor) -> Tensor:
    """Mᵀ [in, in] in solving order: the strictly upper part of L⁻¹ Δᵀ."""
    assert stats.hessian is not None
    assert stats.cross is not None
    drift = permuted(stats.cross - stats.hessian, factor.order)
    parts = chunks(drift.shape[0], _COLUMNS)
    return torch.cat(parallel_map(lambda part: factor.forward(drift[part].T), parts), dim=1).triu_(1)


PROVIDES: tuple[Solver, ...] = (Gptaq(),)
