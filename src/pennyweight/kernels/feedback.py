"""Rounding with error feedback inside a block of columns: the innermost loop of GPTQ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.formats import NumberFormat
from pennyweight.kernels.native import STORED, has_kernels, kernel_table, native


@dataclass(frozen=True)
class Grid:
    """What columns are rounded to: value * scale, or (value - zero) * scale, rounded to the type `stored`.

    scales, zeros   float32 [groups, rows]; zeros None where there are none
    """

    element: NumberFormat
    scales: Tensor
    zeros: Tensor | None
    stored: torch.dtype


def round_block_(
    targets: Tensor, w: Tensor, values: Tensor, errors: Tensor, *, lower: Tensor, grid: Grid, groups: Tensor
) -> None:
    """Round a block of columns, the last one first, each with the errors of those before it made up for.

    With j going down: values_j = the grid's nearest to targets_j; errors_j = w_j - decoded_j;
    targets_k += lower_jk errors_j for all k < j. All [columns, rows] float32; `lower` [columns, columns] is unit lower;
    `groups` int64 [columns] are rows of the grid's scales. `values`, `errors` and `targets` are written.
    """
    library = native() if has_kernels(targets, grid.element) else None
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
        groups,
        grid.element.smallest,
        grid.element.largest,
        STORED[grid.stored],
        kernel_table(),
    )


def _round_block(
    targets: Tensor, w: Tensor, values: Tensor, errors: Tensor, *, lower: Tensor, grid: Grid, groups: Tensor
) -> None:
    for j in range(targets.shape[0] - 1, -1, -1):
        scale = grid.scales[groups[j]]
        zero = None if grid.zeros is None else grid.zeros[groups[j]]
        scaled = targets[j] / scale
        values[j] = grid.element.nearest(scaled if zero is None else scaled + zero)
        decoded = (values[j] if zero is None else values[j] - zero) * scale
        torch.sub(w[j], decoded.to(grid.stored).float(), out=errors[j])
        targets[:j].addr_(lower[j, :j], errors[j])
