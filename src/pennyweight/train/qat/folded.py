"""A site with the batch norm behind it: trained with the statistics of the batch, rounded as it will be deployed."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network.fold import NORMS, Norm, foldable
from pennyweight.models.network.network import Network, NetworkSite
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


def norms_of(network: Network) -> dict[str, tuple[fx.Node, Norm]]:
    """Site -> the call of the batch norm that can be folded into it, and that norm."""
    found = {}
    nodes = {node.name: node for node in network.graph.graph.nodes}
    for name, site in foldable(network).items():
        norm = network.graph.get_submodule(str(nodes[name].target))
        assert isinstance(norm, NORMS)
        found[site.name] = (nodes[name], norm)
    return found


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
        factor = norm.factor(self.statistics.epsilon)
        if self.statistics.is_used:
            return self._with_batch_statistics(x, weight, bias, norm, away_from_zero(factor))
        return self.operation(x, self._rounded(weight, factor), norm.folded_bias(factor, bias))

    def _with_batch_statistics(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: NormTensors, factor: Tensor
    ) -> Tensor:
        y = self.operation(x, self._rounded(weight, factor), None)
        along = (-1,) + (1,) * (y.ndim - 2)
        y = y / factor.reshape(along)
        made: Tensor = self.statistics(y if bias is None else y + bias.reshape(along), norm)
        return made

    def _rounded(self, weight: Tensor, factor: Tensor) -> Tensor:
        """round(W f), shaped as torch has the weight."""
        matrix, rows = folded_matrix(self.site.matrix(weight), factor)
        return self.site.tensor(matrix if self.rounding is None else self.rounding(matrix, rows))
