"""Seeded problems with correlated inputs, and the objective that solvers lower."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.base import Statistics


def problem(rows: int, cols: int, *, seed: int = 0, tokens: int = 0) -> tuple[Tensor, Statistics]:
    """A weight, and the moments of inputs with a falling spectrum whose columns differ in size.

    The inputs of the original model are those of the quantized one with some drift and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator)
    latent = torch.randn(tokens or 4 * cols, cols, generator=generator) / torch.arange(1, cols + 1).sqrt()
    mixing = torch.randn(cols, cols, generator=generator)
    spread = torch.exp(0.5 * torch.randn(cols, generator=generator))
    x = latent @ mixing * spread
    drift = torch.randn(cols, cols, generator=generator) * (0.05 / cols**0.5)
    original = x + x @ drift + 0.05 * torch.randn(x.shape, generator=generator) * spread
    return w, Statistics(x.T @ x / x.shape[0], original.T @ x / x.shape[0])


def loss(w: Tensor, weight: QuantizedWeight, stats: Statistics) -> float:
    """tr(E H Eᵀ) in float64, E the error of the decoded weight."""
    assert stats.hessian is not None
    error = w.double() - weight.dequantize().double()
    return float(((error @ stats.hessian.double()) * error).sum())


def loss_of_outputs(w: Tensor, weight: QuantizedWeight, stats: Statistics) -> float:
    """The mean of |W x̃ - Ŵ x|² in float64, but for what no weight can lower: tr(E H Eᵀ) with E = W G H⁻¹ - Ŵ."""
    assert stats.hessian is not None
    assert stats.cross is not None
    best = torch.linalg.solve(stats.hessian.double(), w.double() @ stats.cross.double(), left=False)
    error = best - weight.dequantize().double()
    return float(((error @ stats.hessian.double()) * error).sum())


def damped(stats: Statistics, damping: float = 0.01) -> Tensor:
    """The Hessian in float64 with `damping` times the mean of its diagonal added to that."""
    assert stats.hessian is not None
    h = stats.hessian.double()
    return h + damping * h.diagonal().mean() * torch.eye(h.shape[0], dtype=h.dtype)


def agreement(one: Tensor, other: Tensor) -> float:
    """The fraction of equal elements."""
    return float((one == other).double().mean())
