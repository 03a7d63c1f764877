"""Cholesky factorisation whose bits do not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.core.errors import NotPositiveDefiniteError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.matmul import matmul_nt

_TILE = 512


def cholesky_(a: Tensor, *, tile: int = _TILE) -> Tensor:
    """The lower factor L of a = L Lᵀ, for symmetric float32 `a` [n, n], by tiles, right-looking, made in `a`'s memory.

    Every tile is computed by one thread: LAPACK's own threads would change the last bits with their number.
    Raises NotPositiveDefiniteError.
    """
    parts = chunks(a.shape[0], tile)
    count = len(parts)
    tiles = {(i, j): a[parts[i], parts[j]].contiguous() for i in range(count) for j in range(i + 1)}
    for k in range(count):
        _factorize_column(tiles, k, count)
    a.zero_()
    for (i, j), block in tiles.items():
        a[parts[i], parts[j]] = block
    return a


def _factorize_column(tiles: dict[tuple[int, int], Tensor], k: int, count: int) -> None:
    below = range(k + 1, count)
    [(tiles[k, k], inverse)] = parallel_map(_factor_and_inverse, [tiles[k, k]])

    def panel(i: int) -> None:
        tiles[i, k] = matmul_nt(tiles[i, k], inverse)

    def trailing(pair: tuple[int, int]) -> None:
        tiles[pair] -= matmul_nt(tiles[pair[0], k], tiles[pair[1], k])

    parallel_map(panel, below)
    parallel_map(trailing, [(i, j) for i in below for j in range(k + 1, i + 1)])


def _factor_and_inverse(a: Tensor) -> tuple[Tensor, Tensor]:
    lower, failed = torch.linalg.cholesky_ex(a)
    if failed or not lower.isfinite().all():
        raise NotPositiveDefiniteError("the Hessian is not positive definite at this damping")
    identity = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
    return lower, torch.linalg.solve_triangular(lower, identity, upper=False)
