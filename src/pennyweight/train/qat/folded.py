"""A site with the batch norm behind it: trained with the statistics of the batch, rounded as it will be deployed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network.fold import NORMS, Norm, foldable
from pennyweight.models.network.network import Network, NetworkSite
from pennyweight.schemes import PerTensor, Scheme
from pennyweight.train.qat.operations import Operation
from pennyweight.train.qat.statistics import BatchStatistics, NormTensors
from pennyweight.train.qat.weights import WeightRounding

# Below this a channel is as good as switched off; divided by, it stays finite.
_LEAST = 2.0**-40


def folded_matrix(matrix: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """W f [out, in], and the sizes |f| [out] of its rows."""
    return matrix * factor[:, None], away_from_zero(factor).abs()


def away_from_zero(factor: Tensor) -> Tensor:
    return torch.where(factor.abs() < _LEAST, _LEAST, factor)


def start_sizes(norm: Norm, scheme: Scheme) -> Tensor:
    """What rows [out] of a weight are multiplied by before its scales are fitted: their signs where each row has its
    own scale, whose size is multiplied in later, else gamma / sigma."""
    factor = away_from_zero(NormTensors.of(norm).factor(norm.eps).detach())
    return factor if isinstance(scheme.granularity, PerTensor) else factor.sign()


def norms_of(network: Network) -> dict[str, tuple[fx.Node, Norm]]:
    """Site -> the call of the batch norm that can be folded into it, and that norm."""
    found = {}
    nodes = {node.name: node for node in network.graph.graph.nodes}
    for name, site in foldable(network).items():
        norm = network.graph.get_submodule(str(nodes[name].target))
        assert isinstance(norm, NORMS)
        found[site.name] = (nodes[name], norm)
    return found


@torch.library.custom_op("pennyweight::before_update", mutates_args=())
def _before_update(x: Tensor) -> Tensor:
    return x.clone()


@_before_update.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _unchanged(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


_before_update.register_autograd(_unchanged)


class FoldedSite(nn.Module):
    """A convolution or linear map and its batch norm.

    In training, with f = gamma / sigma of the running variance (Krishnamoorthi, arXiv:1806.08342, section 3.2.2):

        y = norm(round(W f) * x / f + b)        with the mean and variance of the batch

    Where scales belong to rows, f goes in and out of them again but for its sign, which is all that is used then.
    In eval, and in training once the statistics are frozen, what a runtime computes:

        y = round(W f) * x + beta + (b - mean) f

    The tensors come as arguments: they belong to the graph, under the names that they have in the network.
    """

    def __init__(self, site: NetworkSite, operation: Operation, norm: Norm, rounding: WeightRounding | None) -> None:
        super().__init__()
        self.site, self.operation, self.rounding = site, operation, rounding
        self.statistics = BatchStatistics(norm)

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
        if self.statistics.is_used:
            y = self._without_norm(x, weight, norm)
            made: Tensor = self.statistics(y if bias is None else y + _along(bias, y), norm)
            return made
        factor = norm.factor(self.statistics.epsilon)
        matrix, rows = folded_matrix(self.site.matrix(weight), factor)
        if self.rounding is not None:
            matrix = self.rounding(matrix, rows)
        return self.operation(x, self.site.tensor(matrix), norm.folded_bias(factor, bias))

    def _without_norm(self, x: Tensor, weight: Tensor, norm: NormTensors) -> Tensor:
        """round(W f) * x / f."""
        matrix = self.site.matrix(weight)
        if self.rounding is None:
            return self.operation(x, weight, None)
        if self.rounding.is_by_rows:
            ones = torch.ones_like(norm.variance)
            sign = ones if norm.gamma is None else torch.where(norm.gamma < 0, -ones, ones)
            rounded = self.rounding(matrix * sign[:, None]) * sign[:, None]
            return self.operation(x, self.site.tensor(rounded), None)
        # What torch.compile computes again for the backward pass would be made of the variance after its update.
        kept = replace(norm, variance=_before_update(norm.variance))
        factor = away_from_zero(kept.factor(self.statistics.epsilon))
        y = self.operation(x, self.site.tensor(self.rounding(*folded_matrix(matrix, factor))), None)
        return y / _along(factor, y)


def _along(channels: Tensor, y: Tensor) -> Tensor:
    """`channels` so that it broadcasts over `y` [batch, channels, ...]."""
    return channels.reshape((-1,) + (1,) * (y.ndim - 2))
