"""Polishing: columns rounded again one after the other, each given all others."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.feedback import round_block_
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.feedback import REAL_GAIN, grid_of

# Rows polished together by one thread, and columns whose sums over all others are made at once.
_ROWS = 1024
_COLUMNS = 128


def polished(weight: QuantizedWeight, targets: Tensor, hessian: Tensor, shift: Tensor) -> QuantizedWeight:
    """One pass of cyclic coordinate descent on tr(E H Eᵀ), E = T - Ŵ [out, in]; H is `hessian` + diag(`shift`).

    Given all other columns, the objective of column j is H_jj |A_j - Ŵ_j|² and a constant, with the aim

        A_j = Ŵ_j + (E H)_j / H_jj

    so column j is rounded from A_j, on the grid that there is. When it changes by d, the aims of the columns k still
    to come change by d H_jk / H_kk. Rows that gain nothing keep their codes; so do those that rounding to the stored
    type would make worse.
    """

    def rows(part: slice) -> Tensor:
        own = weight.rows(part)
        return _polish_rows(own, targets[part] - own.dequantize(), hessian, shift)

    codes = torch.cat(parallel_map(rows, chunks(targets.shape[0], _ROWS)))
    return QuantizedWeight.of(codes, weight.parameters, weight.scheme)


def _polish_rows(weight: QuantizedWeight, errors: Tensor, hessian: Tensor, shift: Tensor) -> Tensor:
    """Codes uint8 [rows, in]; `errors` [rows, in] are used up."""
    scheme = weight.scheme
    groups = torch.arange(errors.shape[1], device=errors.device) // scheme.group_size(errors.shape[1])
    grid = grid_of(weight.parameters, scheme, errors.shape[0])
    decoded = weight.dequantize().T.contiguous()
    values = torch.empty_like(decoded)
    gained, left = torch.zeros(2, errors.shape[0], device=errors.device)
    for part in chunks(errors.shape[1], _COLUMNS)[::-1]:
        diagonal = (hessian[part, part].diagonal() + shift[part])[:, None]
        pull = matmul_nt(hessian[part], errors) + shift[part, None] * errors[:, part].T
        aims = pull.div_(diagonal).add_(decoded[part])
        steps = torch.empty_like(aims)
        # H_jk / H_kk for k < j; the diagonal is not read.
        lower = (hessian[part, part] / diagonal.T).contiguous()
        round_block_(aims, decoded[part], values[part], steps, lower=lower, grid=grid, groups=groups[part])
        before = aims - decoded[part]
        after = (before + steps).square_()
        gained += before.square_().sub_(after).mul_(diagonal).sum(0)
        left += after.mul_(diagonal).sum(0)
        errors[:, part] += steps.T
    return torch.where((gained > REAL_GAIN * left)[:, None], scheme.element.encode(values).T, weight.codes).contiguous()
