"""Batch norms whose statistics are those of the batch, stand still, or are estimated anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as f
from torch import Tensor, nn

from pennyweight.models.network.fold import Norm

# What a batch norm that averages over all batches (momentum None) is captured with, and what it gets here.
_NO_MOMENTUM, _USUAL_MOMENTUM = 0.0, 0.1


@dataclass(frozen=True)
class NormTensors:
    """gamma, beta [channels] or None, and the running mean and variance."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    variance: Tensor

    @staticmethod
    def of(norm: nn.Module) -> NormTensors:
        """Those of a batch norm, or of a module that holds what one has."""
        parts: list[Any] = [getattr(norm, name, None) for name in ("weight", "bias", "running_mean", "running_var")]
        return NormTensors(*parts)

    def factor(self, epsilon: float) -> Tensor:
        """gamma / sigma, sigma = sqrt(variance + epsilon), in float32."""
        inverse = torch.rsqrt(self.variance + epsilon)
        return inverse if self.gamma is None else self.gamma * inverse

    def folded_bias(self, factor: Tensor, bias: Tensor | None) -> Tensor:
        """beta + (bias - mean) gamma / sigma, in float32."""
        shifted = (-self.mean if bias is None else bias - self.mean) * factor
        return shifted if self.beta is None else self.beta + shifted


class Pool:
    """Mean and variance of each channel over all batches that were seen."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    def update(self, y: Tensor) -> None:
        """`y` [batch, channels, ...]; summed in float64 where the device has it."""
        kind = torch.float32 if y.device.type == "mps" else torch.float64
        columns = y.detach().transpose(0, 1).flatten(1).to(kind)
        total, squares = columns.sum(1), columns.square().sum(1)
        self.total = total if self.total is None else self.total + total
        self.squares = squares if self.squares is None else self.squares + squares
        self.count += columns.shape[1]

    @property
    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """float32; the variance is unbiased, as torch's running variance is."""
        assert self.total is not None
        assert self.squares is not None
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp_min(0) * (self.count / max(1, self.count - 1))
        return mean.float(), variance.float()


class BatchStatistics(nn.Module):
    """A batch norm with the statistics of the batch, and when these are used.

    is_frozen  the running statistics are used in training too, and stay
    pool       while statistics are estimated anew: where they are gathered
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.epsilon = norm.eps
        momentum = norm.momentum
        self.momentum = _USUAL_MOMENTUM if momentum is None or momentum == _NO_MOMENTUM else momentum
        self.is_frozen = False
        self.pool: Pool | None = None

    @property
    def is_used(self) -> bool:
        return self.pool is not None or (self.training and not self.is_frozen)

    def forward(self, y: Tensor, norm: NormTensors) -> Tensor:
        if self.pool is not None:
            self.pool.update(y)
            return f.batch_norm(y, None, None, norm.gamma, norm.beta, True, 0.0, self.epsilon)
        return f.batch_norm(y, norm.mean, norm.variance, norm.gamma, norm.beta, True, self.momentum, self.epsilon)


class LoneNorm(nn.Module):
    """A batch norm that is part of no site."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.statistics = BatchStatistics(norm)

    def forward(self, x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, variance: Tensor) -> Tensor:
        if self.statistics.is_used:
            made: Tensor = self.statistics(x, NormTensors(gamma, beta, mean, variance))
            return made
        return f.batch_norm(x, mean, variance, gamma, beta, False, 0.0, self.statistics.epsilon)
