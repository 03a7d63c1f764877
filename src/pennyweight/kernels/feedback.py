"""Rounding with error feedback inside a block of columns: the innermost loop of GPTQ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.formats import NumberFormat
from pennyweight.formats.integer import Int
from pennyweight.kernels.native import STORED, has_kernels, kernel_table, native, table_of


@dataclass(frozen=True)
class Grid:
    """What columns are rounded to: (value - zero) * scale or value * scale - offset, rounded to the type `stored`.

    scales, zeros, offsets   float32 [groups, rows], scales never zero; zeros and offsets None where there are none
    """

    element: NumberFormat
    scales: Tensor
    zeros: Tensor | None
    stored: torch.dtype
    offsets: Tensor | None = None


def round_block_(
    targets: Tensor, w: Tensor, values: Tensor, errors: Tensor, *, lower: Tensor, grid: Grid, groups: Tensor
) -> None:
    """Round a block of columns, the last one first, each with the errors of those before it made up for.

    With j going down: values_j = the grid's nearest to targets_j; errors_j = w_j - decoded_j;
    targets_k += lower_jk errors_j for all k < j. All [columns, rows] float32; `lower` [columns, columns] is unit lower;
    `groups` int64 [columns] are rows of the grid's scales. `values`, `errors` and `targets` are written.
    """
    is_whole = isinstance(grid.element, Int)
    library = native() if has_kernels(targets, grid.element, tables=True) else None
    if library is None:
        _round_block(targets, w, values, errors, lower=lower, grid=grid, groups=groups)
        return
    library.round_block(
        targets,
        w,
        values,
        errors,
        lower,
        grid.scales,
        grid.zeros,
        grid.offsets,
        groups,
        grid.element.smallest,
        grid.element.largest,
        None if is_whole else table_of(grid.element),
        STORED[grid.stored],
        kernel_table(),
    )


def _round_block(
    targets: Tensor, w: Tensor, values: Tensor, errors: Tensor, *, lower: Tensor, grid: Grid, groups: Tensor
) -> None:
    for j in range(targets.shape[0] - 1, -1, -1):
        scale = grid.scales[groups[j]]
        zero, offset = (None if given is None else given[groups[j]] for given in (grid.zeros, grid.offsets))
        scaled = (targets[j] if offset is None else targets[j] + offset) / scale
        values[j] = grid.element.nearest(scaled if zero is None else scaled + zero)
        decoded = (values[j] if zero is None else values[j] - zero) * scale
        decoded = (decoded if offset is None else decoded - offset).to(grid.stored).float()
        torch.sub(w[j], decoded, out=errors[j])
        targets[:j].addr_(lower[j, :j], errors[j])
