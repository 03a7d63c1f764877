"""What the scales of weights and edges start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import DataError
from pennyweight.models.network import Network
from pennyweight.models.network.quantized import put_behind
from pennyweight.schemes import Parameters, Scheme, fit_scales
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.schemes.quantized import grouped
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.mse import Mse
from pennyweight.train.qat.batches import checked, device_of, moved
from pennyweight.train.qat.options import WeightStart


def weight_start(matrix: Tensor, scheme: Scheme, how: WeightStart) -> Parameters:
    """Scales, and zero points where there are any, for `matrix` [out, in]."""
    if how != "lsq" or scheme.zero is not None:
        return fit_scales(matrix, scheme, fit="search" if how == "lsq" else how)
    # Esser et al., section 2.1.
    mean = grouped(matrix, scheme).abs().mean(-1)
    scales = torch.where(mean == 0, 1.0, 2 * mean / scheme.element.largest**0.5)
    return Parameters(scales.to(scheme.scale.torch_dtype))


@dataclass(frozen=True)
class EdgeStart:
    """parameters   to start from
    features     numbers for one sample of a batch
    has_negative numbers below 0 were seen
    """

    parameters: ActivationParameters
    features: int
    has_negative: bool


def edge_starts(
    network: Network, edges: Mapping[str, ActivationScheme], batches: Iterable[Any]
) -> dict[str, EdgeStart]:
    """The ranges with the least squared error on what passes the static `edges` of `network` for `batches`.

    Raises DataError where there are no batches, or numbers that are not finite.
    """
    graph = network.copied().graph
    seen = {name: _Seen(name) for name in edges}
    for name, module in seen.items():
        put_behind(graph, name, module, f"{name}_seen")
    graph.recompile()
    place = -1
    with torch.no_grad():
        for place, batch in enumerate(batches):
            inputs = checked(network, batch, place=f"calibration batch {place}").inputs
            given = moved(inputs, device_of(graph))
            graph(*given.args, **given.kwargs)
    if place < 0:
        raise DataError("calibration yields no batches: give at least one, or leave it out and give an example")
    return {name: module.start(edges[name]) for name, module in seen.items()}


class _Seen(nn.Module):
    """Counts what passes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.histogram, self.features = name, Histogram.zero(), 1

    def forward(self, x: Tensor) -> Tensor:
        self.histogram = self.histogram.update(x.detach().cpu(), name=self.name)
        self.features = x.numel() // max(1, x.shape[0] if x.ndim else 1)
        return x

    def start(self, scheme: ActivationScheme) -> EdgeStart:
        return EdgeStart(Mse().choose(self.histogram, scheme), self.features, self.histogram.low < 0)
