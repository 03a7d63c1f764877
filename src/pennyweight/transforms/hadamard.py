"""Orthogonal matrices made of Hadamard matrices, applied without ever being formed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# The largest Hadamard matrix that is multiplied as a matrix.
_LARGEST_CORE = 512


@dataclass(frozen=True)
class Rotation:
    """x -> x Q for the last axis of x, `size` long; Q is orthogonal and the same for every run of `tile` entries.

        Q = diag(signs) H / sqrt(tile)          or, where the mean is to be kept,        Q = H diag(signs) Hᵀ / tile

    with H a Hadamard matrix of `tile` rows whose first column is all ones, and the first sign of each tile 1: then
    1ᵀ Q = 1ᵀ, and a normalization that subtracts the mean does the same to x Q as to x.
    """

    size: int
    tile: int
    signs: Tensor
    keeps_mean: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """x Q, in the type of x (float32 or float64)."""
        tiles = x.reshape(*x.shape[:-1], -1, self.tile)
        signs = self.signs.to(x).reshape(-1, self.tile)
        if self.keeps_mean:
            return _times_transposed(_times(tiles) * signs).div_(self.tile).reshape(x.shape)
        return _times(tiles * signs).div_(math.sqrt(self.tile)).reshape(x.shape)

    def undo(self, x: Tensor) -> Tensor:
        """x Qᵀ."""
        if self.keeps_mean:
            return self.apply(x)
        tiles = x.reshape(*x.shape[:-1], -1, self.tile)
        signs = self.signs.to(x).reshape(-1, self.tile)
        return (_times_transposed(tiles) * signs).div_(math.sqrt(self.tile)).reshape(x.shape)


def random_rotation(size: int, *, seed: int, keeps_mean: bool = False) -> Rotation:
    """A rotation of the whole width where a Hadamard matrix of that size is known, else of the longest runs that are
    a power of two; its signs are random."""
    tile = size if _core_of(size) else size & -size
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1
    if keeps_mean:
        signs[::tile] = 1
    return Rotation(size, tile, signs, keeps_mean)


def tiled_rotation(size: int, tile: int) -> Rotation:
    """The same Hadamard matrix for every run of `tile`, without signs."""
    return Rotation(size, tile, torch.ones(size))


def is_known(size: int) -> bool:
    """Whether there is a Hadamard matrix of this size here."""
    return _core_of(size) > 0


def _core_of(size: int) -> int:
    """The size m of the core of H = H_2^k ⊗ H_m, the smallest that is known; 0 without one."""
    core = size // (size & -size)
    while core <= min(size, _LARGEST_CORE):
        if size % core == 0 and _core(core) is not None:
            return core
        core *= 2
    return 0


def _times(x: Tensor) -> Tensor:
    """x H."""
    return _product(x, is_transposed=False)


def _times_transposed(x: Tensor) -> Tensor:
    """x Hᵀ."""
    return _product(x, is_transposed=True)


def _product(x: Tensor, *, is_transposed: bool) -> Tensor:
    size = x.shape[-1]
    core = _core_of(size)
    matrix = _core(core)
    assert matrix is not None, size
    y = x.reshape(*x.shape[:-1], size // core, core)
    if core > 1:
        y = y @ (matrix.T if is_transposed else matrix).to(y)
    half = 1
    while half < size // core:
        pairs = y.reshape(*x.shape[:-1], size // core // (2 * half), 2, half, core)
        a, b = pairs.select(-3, 0), pairs.select(-3, 1)
        y = torch.stack([a + b, a - b], dim=-3)
        half *= 2
    return y.reshape(x.shape)


@cache
def _core(size: int) -> Tensor | None:
    """A Hadamard matrix by Paley's constructions, float64, its first column all ones; None where there is none."""
    if size in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    if size % 4 == 0 and _is_prime(size - 1):
        found = torch.eye(size, dtype=torch.float64) + _bordered(size - 1, -1)
    elif size % 4 == 0 and size % 8 and _is_prime(size // 2 - 1):
        first = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        second = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        found = torch.kron(_bordered(size // 2 - 1, 1), first)
        found += torch.kron(torch.eye(size // 2, dtype=torch.float64), second)
    else:
        return None
    return found * found[:, :1]


def _bordered(q: int, below: int) -> Tensor:
    """[[0, 1ᵀ], [below 1, J]], J_ij whether i - j is a square modulo the prime q: 1 or -1, and 0 where i = j."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    made = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0] = 1, below
    index = torch.arange(q)
    made[1:, 1:] = character[(index[:, None] - index) % q]
    return made


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))
