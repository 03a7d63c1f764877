"""The second moment of a site's input, in other words its Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.kernels.native import kernel_table, multiplies_bfloat16, native

# Columns per tile: tiles above the diagonal are computed, the others mirrored.
_TILE = 512
# Columns of a panel of the native kernel.
_PANEL = 64


@dataclass(frozen=True)
class SecondMoment:
    """sum over rows of x xᵀ [in, in] in float32, and the number of rows; `hessian` is their quotient.

    Only the tiles on and above the diagonal of `total` are kept up to date.
    """

    total: Tensor
    rows: int

    @staticmethod
    def zero(inputs: int, device: torch.device | str = "cpu") -> SecondMoment:
        return SecondMoment(torch.zeros(inputs, inputs, device=device), 0)

    def update_(self, x: list[Tensor]) -> SecondMoment:
        """Add the rows of all tensors in `x`, each [tokens, in] of any float type, and empty the list.

        The sum is made in place, the new statistic is returned.
        """
        inputs = self.total.shape[0]
        for part in x:
            if part.ndim != 2 or part.shape[1] != inputs:
                raise ShapeError(f"inputs of shape {tuple(part.shape)} cannot join a second moment of width {inputs}")
        rows = sum(part.shape[0] for part in x)
        if rows:
            is_narrow = all(part.dtype == torch.bfloat16 and part.device.type == "cpu" for part in x)
            is_native = is_narrow and inputs % _PANEL == 0 and multiplies_bfloat16()
            (_add_products_native if is_native else _add_products)(self.total, x)
        x.clear()
        return SecondMoment(self.total, self.rows + rows)

    def merge_(self, other: SecondMoment) -> SecondMoment:
        """The statistic of both samples together, made in this one's memory."""
        self.total.add_(other.total)
        return SecondMoment(self.total, self.rows + other.rows)

    def hessian_(self) -> Tensor:
        """mean of x xᵀ, float32 [in, in], symmetric to the last bit, in the memory of the statistic, now used up."""
        mean = self.total.div_(max(self.rows, 1))
        parts = chunks(mean.shape[0], _TILE)

        def mirror(n: int) -> None:
            i = parts[n]
            upper = mean[i, i].triu()
            mean[i, i] = upper + upper.triu(1).T
            for j in parts[n + 1 :]:
                mean[j, i] = mean[i, j].T

        parallel_map(mirror, range(len(parts)))
        return mean


def _tiles(inputs: int, size: int) -> list[tuple[slice, slice]]:
    """Tiles on and above the diagonal."""
    parts = chunks(inputs, size)
    return [(i, j) for n, i in enumerate(parts) for j in parts[n:]]


def _add_products(total: Tensor, x: list[Tensor]) -> None:
    """total += sum of x xᵀ on and above the diagonal of tiles, products and sums in float32; `x` is emptied."""
    inputs, rows = total.shape[0], sum(part.shape[0] for part in x)
    transposed = torch.empty(inputs, rows, device=total.device)

    def transpose(columns: slice) -> None:
        torch.cat([part[:, columns].T.float() for part in x], dim=1, out=transposed[columns])

    parallel_map(transpose, chunks(inputs, _TILE))
    x.clear()

    def tile(pair: tuple[slice, slice]) -> None:
        total[pair] += matmul_nt(transposed[pair[0]], transposed[pair[1]])

    parallel_map(tile, _tiles(inputs, _TILE))


def _add_products_native(total: Tensor, x: list[Tensor]) -> None:
    """The same for bfloat16, whose products are exact in float32."""
    library, table = native(), kernel_table()
    assert library is not None
    count = total.shape[0] // _PANEL
    rows = torch.cat(x).view(torch.uint16)
    x.clear()
    panels = torch.empty(count, (rows.shape[0] + 1) // 2, _PANEL, dtype=torch.uint32)
    parallel_map(lambda panel: library.pair_rows(rows, panel, panels, table), range(count))

    def tile(pair: tuple[slice, slice]) -> None:
        library.add_products(panels, total, pair[0].start, pair[0].stop, pair[1].start, pair[1].stop, table)

    parallel_map(tile, _tiles(count, _TILE // _PANEL))
