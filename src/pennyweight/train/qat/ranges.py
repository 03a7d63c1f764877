"""What the scales of weights and edges start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import DataError
from pennyweight.models.network.network import Network
from pennyweight.models.network.quantized import insert_after
from pennyweight.schemes import Parameters, Scheme, fit_scales
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.schemes.quantized import grouped
from pennyweight.train.qat.options import WeightStart

# Numbers of a batch that are looked at, and ends of the range that are tried, as shares of the whole.
_SAMPLE = 1 << 16
_SHARES = 40


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
    nodes = {node.name: node for node in graph.graph.nodes}
    seen = {name: _Seen(name) for name in edges}
    for name, module in seen.items():
        insert_after(graph, nodes[name], module, f"{name}_seen")
    graph.recompile()
    count = 0
    with torch.no_grad():
        for batch in batches:
            given = network.inputs(batch)
            graph(*given.args, **given.kwargs)
            count += 1
    if not count:
        raise DataError("calibration yields no batches: give at least one, or leave it out and give an example")
    return {name: module.start(edges[name]) for name, module in seen.items()}


class _Seen(nn.Module):
    """Keeps some of what passes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.parts, self.features = name, list[Tensor](), 1
        self.low = self.high = 0.0

    def forward(self, x: Tensor) -> Tensor:
        flat = x.detach().float().flatten()
        low, high = (float(end) for end in torch.aminmax(flat))
        if not (abs(low) < torch.inf and abs(high) < torch.inf):
            raise DataError(f"{self.name}: calibration gives numbers that are not finite; look for NaN in its batches")
        self.low, self.high = min(low, self.low), max(high, self.high)
        self.features = flat.numel() // max(1, x.shape[0] if x.ndim else 1)
        self.parts.append(flat[:: max(1, flat.numel() // _SAMPLE)].clone())
        return x

    def start(self, scheme: ActivationScheme) -> EdgeStart:
        sample = torch.cat(self.parts)
        tried = [
            scheme.parameters(self.low * share, self.high * share)
            for share in torch.linspace(1.0, 0.1 if scheme.element.bits < 8 else 0.6, _SHARES).tolist()
        ]
        errors = [float((one.round_trip(sample) - sample).square().mean()) for one in tried]
        return EdgeStart(tried[errors.index(min(errors))], self.features, self.low < 0)
