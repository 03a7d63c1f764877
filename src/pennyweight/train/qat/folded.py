"""A site with the batch norm behind it: trained with the statistics of the batch, rounded as it will be deployed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as f
from torch import Tensor, nn

from pennyweight.models.network.fold import Norm
from pennyweight.models.network.network import NetworkSite
from pennyweight.train.qat.operations import Operation
from pennyweight.train.qat.weights import WeightRounding

# Below this a channel is as good as switched off; divided by, it stays finite.
_LEAST = 2.0**-40
# What a batch norm that averages over all batches (momentum None) is captured with, and what it gets here.
_NO_MOMENTUM, _USUAL_MOMENTUM = 0.0, 0.1


@dataclass(frozen=True)
class NormTensors:
    """gamma, beta [channels] or None, and the running mean and variance."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    variance: Tensor

    def factor(self, epsilon: float) -> Tensor:
        """gamma / sigma, sigma = sqrt(variance + epsilon), in float32."""
        inverse = torch.rsqrt(self.variance + epsilon)
        return inverse if self.gamma is None else self.gamma * inverse

    def folded_bias(self, factor: Tensor, bias: Tensor | None) -> Tensor:
        """beta + (bias - mean) gamma / sigma, in float32."""
        shifted = (-self.mean if bias is None else bias - self.mean) * factor
        return shifted if self.beta is None else self.beta + shifted


def away_from_zero(factor: Tensor) -> Tensor:
    return torch.where(factor.abs() < _LEAST, _LEAST, factor)


class PooledStatistics:
    """Mean and variance of each channel over all batches that it has seen."""

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


class FoldedSite(nn.Module):
    """A convolution or linear map and its batch norm.

    In training, with f = gamma / sigma of the running variance (Krishnamoorthi, arXiv:1806.08342, section 3.2.2):

        y = norm(round(W f) * x / f + b)        with the mean and variance of the batch

    In eval, and in training once the statistics are frozen, what a runtime computes:

        y = round(W f) * x + beta + (b - mean) f

    The tensors come as arguments: they belong to the graph, under the names that they have in the network.
    """

    def __init__(self, site: NetworkSite, operation: Operation, norm: Norm, rounding: WeightRounding | None) -> None:
        super().__init__()
        self.site, self.operation, self.rounding = site, operation, rounding
        self.epsilon = norm.eps
        momentum = norm.momentum
        self.momentum = _USUAL_MOMENTUM if momentum is None or momentum == _NO_MOMENTUM else momentum
        self.is_frozen = False
        # While statistics are estimated anew: where they are gathered.
        self.pooled: PooledStatistics | None = None

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        variance: Tensor,
    ) -> Tensor:
        norm = NormTensors(gamma, beta, mean, variance)
        if self.pooled is not None or (self.training and not self.is_frozen):
            return self._with_batch_statistics(x, weight, bias, norm)
        factor = norm.factor(self.epsilon)
        return self.operation(x, self.rounded(weight, factor), norm.folded_bias(factor, bias))

    def _with_batch_statistics(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: NormTensors) -> Tensor:
        factor = away_from_zero(norm.factor(self.epsilon))
        y = self.operation(x, self.rounded(weight, factor), None)
        along = (-1,) + (1,) * (y.ndim - 2)
        y = y / factor.reshape(along)
        if bias is not None:
            y = y + bias.reshape(along)
        if self.pooled is not None:
            self.pooled.update(y)
            return f.batch_norm(y, None, None, norm.gamma, norm.beta, True, 0.0, self.epsilon)
        return f.batch_norm(y, norm.mean, norm.variance, norm.gamma, norm.beta, True, self.momentum, self.epsilon)

    def rounded(self, weight: Tensor, factor: Tensor) -> Tensor:
        """round(W f), shaped as torch has the weight."""
        matrix = self.site.matrix(weight) * factor[:, None]
        if self.rounding is not None:
            matrix = self.rounding(matrix, away_from_zero(factor).abs())
        return self.site.tensor(matrix)
