"""Cholesky factorisation whose bits do not depend on the number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.core.errors import NotPositiveDefiniteError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.matmul import matmul_nt

_TILE = 512
# Size from which a tile is factored by halves: LAPACK is slow where its products are.
_LEAF = 64


def cholesky_(a: Tensor, *, tile: int = _TILE) -> Tensor:
    """The lower factor L of a = L Lᵀ, for symmetric float32 `a` [n, n], by tiles, right-looking, made in `a`'s memory.

    Every tile is computed by one thread: LAPACK's own threads would change the last bits with their number.
    Raises NotPositiveDefiniteError.
    """
    parts = chunks(a.shape[0], tile)
    count = len(parts)
    tiles = {(i, j): a[parts[i], parts[j]] for i in range(count) for j in range(i + 1)}
    # Contiguous, as oneDNN wants them; by as many threads as there are.
    tiles.update(zip(tiles, parallel_map(Tensor.contiguous, tiles.values()), strict=True))
    inverse: Tensor | None = None
    if count:
        [inverse] = parallel_map(lambda k: _factor_(tiles, k), [0])
    for k in range(count):
        assert inverse is not None
        inverse = _factorize_column(tiles, k, count, inverse)

    def back(i: int) -> None:
        for j in range(i + 1):
            a[parts[i], parts[j]] = tiles[i, j]
        a[parts[i], parts[i].stop :] = 0

    parallel_map(back, range(count))
    return a


def _factorize_column(tiles: dict[tuple[int, int], Tensor], k: int, count: int, inverse: Tensor) -> Tensor | None:
    """Finish column `k` whose diagonal tile is a factor with this inverse; the inverse of the next factor."""
    below = range(k + 1, count)

    def panel(i: int) -> None:
        tiles[i, k] = matmul_nt(tiles[i, k], inverse)

    def trailing(pair: tuple[int, int]) -> Tensor | None:
        tiles[pair] -= matmul_nt(tiles[pair[0], k], tiles[pair[1], k])
        # The next factor is made while other threads are still busy with this column.
        return _factor_(tiles, k + 1) if pair == (k + 1, k + 1) else None

    parallel_map(panel, below)
    found = parallel_map(trailing, [(i, j) for i in below for j in range(k + 1, i + 1)])
    return found[0] if found else None


def _factor_(tiles: dict[tuple[int, int], Tensor], k: int) -> Tensor:
    tiles[k, k], inverse = _factor_and_inverse(tiles[k, k])
    return inverse


def _factor_and_inverse(a: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of `a` and the inverse of that, by halves: almost all of it becomes products.

    | A  Bᵀ |    | L    | | L    |ᵀ    | L    |⁻¹   | L⁻¹              |
    | B  C  | =  | P  M | | P  M | ,   | P  M |   = | -M⁻¹ P L⁻¹  M⁻¹ | ,   P = B L⁻ᵀ,   M Mᵀ = C - P Pᵀ
    """
    size = a.shape[0]
    if size <= _LEAF:
        lower, failed = torch.linalg.cholesky_ex(a)
        if failed or not lower.isfinite().all():
            raise NotPositiveDefiniteError("the Hessian is not positive definite at this damping")
        identity = torch.eye(size, dtype=a.dtype, device=a.device)
        return lower, torch.linalg.solve_triangular(lower, identity, upper=False)
    half = size // 2
    lower, inverse = torch.zeros_like(a), torch.zeros_like(a)
    first, first_inverse = _factor_and_inverse(a[:half, :half])
    panel = matmul_nt(a[half:, :half], first_inverse)
    second, second_inverse = _factor_and_inverse(a[half:, half:] - matmul_nt(panel, panel))
    lower[:half, :half], lower[half:, :half], lower[half:, half:] = first, panel, second
    inverse[:half, :half], inverse[half:, half:] = first_inverse, second_inverse
    inverse[half:, :half] = matmul_nt(second_inverse, matmul_nt(first_inverse.T, panel)).neg_()
    return lower, inverse
