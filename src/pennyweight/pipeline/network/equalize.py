"""Cross-layer equalization of a captured network: the channels between its sites get ranges that fit each other.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from pennyweight.models.network.network import Network, NetworkSite
from pennyweight.models.network.part import Recorder
from pennyweight.pipeline.network.absorb import absorbed
from pennyweight.pipeline.network.channels import Channels, channels_of, clip_of
from pennyweight.transforms.equalize import Between, equalizing_scales


@dataclass(frozen=True)
class EqualizationReport:
    """sites     whose weights were changed
    channels  how many channels between sites got a scale of their own
    sweeps    how often all of them were gone through
    kept      site -> why channels that it makes keep their ranges
    replaced  values of a function with an upper bound (ReLU6) that no calibration data reached: a ReLU now
    absorbed  value behind a ReLU -> of how many channels a constant went into the biases of the readers
    """

    sites: tuple[str, ...] = ()
    channels: int = 0
    sweeps: int = 0
    kept: Mapping[str, str] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    absorbed: Mapping[str, int] = field(default_factory=dict)


def equalized(network: Network, batches: Sequence[Any] | None = None) -> tuple[Network, EqualizationReport]:
    """The same function in weights whose ranges fit each other, and what was done; fold batch norms before.

    Channels between sites are scaled wherever only positively homogeneous operations stand between (channels.py says
    which), all producers and readers of a residual stream together. With `batches` an upper bound that their values
    never reach (ReLU6's) goes, and what is always added to a channel behind a ReLU goes into its readers' biases; so
    the function is the same on them, and without them everywhere.
    """
    unclipped = () if batches is None else _unclipped(network, batches)
    channels = channels_of(network, unclipped=unclipped)
    changed = network.copied()
    matrices = {name: _between(changed, changed.site(name), channels) for name in channels.sites}
    found = equalizing_scales(list(matrices.values()), channels.count)
    touched = []
    for name, between in matrices.items():
        if bool((found.s[between.rows] != 1).any()) or bool((found.s[between.columns] != 1).any()):
            _scale_(changed, changed.site(name), between, found.s)
            touched.append(name)
    replaced = _replaced_(changed, unclipped)
    report = EqualizationReport(tuple(touched), int((found.s != 1).sum()), found.sweeps, channels.fixed, replaced)
    if batches is None:
        return changed, report
    changed, counts = absorbed(changed, batches)
    return changed, replace(report, absorbed=counts)


def _between(network: Network, site: NetworkSite, channels: Channels) -> Between:
    each = channels.sites[site.name]
    return Between(site.matrix(network.weight(site).detach()), each.rows, each.columns)


def _scale_(network: Network, site: NetworkSite, between: Between, s: Tensor) -> None:
    weight, bias = network.weight(site), getattr(network.graph.get_submodule(site.name), "bias", None)
    with torch.no_grad():
        weight.copy_(site.tensor(between.scaled(s)))
        if bias is not None:
            bias.copy_(bias.double() / s[between.rows])


def _upper_bounds(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, float]]:
    """Operations that are a ReLU with an upper bound, and the bound."""
    for node in graph.graph.nodes:
        bounds = clip_of(node)
        if bounds is not None and bounds[0] == 0 and bounds[1] < torch.inf:
            yield node, bounds[1]


def _unclipped(network: Network, batches: Sequence[Any]) -> tuple[str, ...]:
    """Those whose bound no value of `batches` reaches."""
    bounds = dict(_upper_bounds(network.graph))
    sources = frozenset(node.all_input_nodes[0].name for node in bounds)
    if not bounds:
        return ()
    highest = dict.fromkeys(sources, -torch.inf)
    for batch in batches:
        for name, value in Recorder.values(network, network.inputs(batch), sources).items():
            highest[name] = max(highest[name], float(value.max()))
    return tuple(node.name for node, bound in bounds.items() if highest[node.all_input_nodes[0].name] < bound)


def _replaced_(network: Network, unclipped: Sequence[str]) -> tuple[str, ...]:
    for node in network.graph.graph.nodes:
        if node.name in unclipped:
            node.target, node.args, node.kwargs = torch.ops.aten.relu.default, (node.args[0],), {}
    network.graph.recompile()
    return tuple(unclipped)
