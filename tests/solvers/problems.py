"""Seeded problems with correlated inputs, and the objective that solvers lower."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.base import Statistics


def problem(rows: int, cols: int, *, seed: int = 0, tokens: int = 0) -> tuple[Tensor, Statistics]:
    """A weight, and the Hessian of inputs with a falling spectrum whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=generator)
    latent = torch.randn(tokens or 4 * cols, cols, generator=generator) / torch.arange(1, cols + 1).sqrt()
    mixing = torch.randn(cols, cols, generator=generator)
    spread = torch.exp(0.5 * torch.randn(cols, generator=generator))
    x = latent @ mixing * spread
    return w, Statistics(x.T @ x / x.shape[0])


def loss(w: Tensor, weight: QuantizedWeight, stats: Statistics) -> float:
    """tr(E H Eᵀ) in float64, E the error of the decoded weight."""
    assert stats.hessian is not None
    error = w.double() - weight.dequantize().double()
    return float(((error @ stats.hessian.double()) * error).sum())


def agreement(one: Tensor, other: Tensor) -> float:
    """The fraction of equal elements."""
    return float((one == other).double().mean())
