"""One pass of rounding with error feedback, and the choice between two such passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.feedback import Grid, round_block_
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.schemes import Parameters, QuantizedWeight, Scheme
from pennyweight.solvers.factor import Factor
from pennyweight.solvers.ordering import columns_first, rows_first

# Rows solved together by one thread.
_ROWS = 1024
# Columns whose aims are corrected at a time: the product stays in a core's cache.
_PIECE = 512
# Share of what a row leaves: a smaller gain may be a rounding error of float32, and nothing changes for no such gain.
REAL_GAIN = 1e-5


@dataclass(frozen=True)
class Rounded:
    """A weight, the aims float32 [out, in] that its columns were rounded from, and what is left of each row [out]."""

    weight: QuantizedWeight
    aims: Tensor
    loss: Tensor

    def or_better(self, other: Rounded) -> Rounded:
        """Each row from `other` where that leaves less of it; all of them or none where rows share parameters."""
        scheme, least = self.weight.scheme, 1 - REAL_GAIN
        if scheme.rows_share:
            return other if other.loss.sum() < least * self.loss.sum() else self
        wins = other.loss < least * self.loss
        rows = wins[:, None]
        parameters = Parameters.combined(
            (other.weight.parameters, self.weight.parameters), lambda pair: torch.where(rows, pair[0], pair[1])
        )
        codes = torch.where(rows, other.weight.codes, self.weight.codes)
        aims = torch.where(rows, other.aims, self.aims)
        return Rounded(QuantizedWeight.of(codes, parameters, scheme), aims, torch.where(wins, other.loss, self.loss))


def with_feedback(
    targets: Tensor, scheme: Scheme, parameters: Parameters, factor: Factor, *, is_only: bool = False
) -> Rounded:
    """Round `targets` float32 [out, in] on the grid of `parameters`; see Rounding. Aims and losses are left out, empty,
    of what `is_only` and so will not be compared."""
    groups = factor.order // scheme.group_size(targets.shape[1])

    def rows(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        grid = grid_of(parameters.rows(part, scheme), scheme, part.stop - part.start)
        own = columns_first(targets[part], factor.order)
        values, aims, errors = _round_rows(own, grid, groups, factor)
        codes = rows_first(scheme.element.encode(values), factor.order)
        if is_only:
            return codes, aims.new_empty(codes.shape[0], 0), aims.new_empty(0)
        left = (aims - own).add_(errors).square_().mul_(factor.variances[:, None]).sum(0)
        return codes, rows_first(aims, factor.order), left

    found = parallel_map(rows, chunks(targets.shape[0], _ROWS))
    codes, aims, loss = (torch.cat(parts).contiguous() for parts in zip(*found, strict=True))
    return Rounded(QuantizedWeight.of(codes, parameters, scheme), aims, loss)


def grid_of(parameters: Parameters, scheme: Scheme, rows: int) -> Grid:
    """The grid of `rows` rows with these parameters."""

    def by_group(given: Tensor | None) -> Tensor | None:
        return None if given is None else given.T.expand(-1, rows).contiguous()

    given = parameters.decoded(scheme)
    scales = by_group(given.scales)
    assert scales is not None
    return Grid(scheme.element, scales, by_group(given.zeros), scheme.arithmetic, by_group(given.offsets))


def _round_rows(w: Tensor, grid: Grid, groups: Tensor, factor: Factor) -> tuple[Tensor, Tensor, Tensor]:
    """Values of the number format, aims and errors of the transposed targets `w` [in, rows], in solving order."""
    aims, values, errors = w.clone(), torch.empty_like(w), torch.empty_like(w)
    for part, within, before in zip(factor.blocks, factor.within, factor.before, strict=True):
        round_block_(aims[part], w[part], values[part], errors[part], lower=within, grid=grid, groups=groups[part])
        made = errors[part].T.contiguous()
        for piece in chunks(part.start, _PIECE):
            aims[piece] += matmul_nt(before[piece], made)
    return values, aims, errors
