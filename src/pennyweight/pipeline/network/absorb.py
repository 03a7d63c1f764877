"""Bias absorption: what is always added to a channel behind a ReLU is added by its readers' biases instead.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), section 4.1.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.models.network.network import Network, NetworkSite
from pennyweight.models.network.part import Recorder

_DEVIATIONS = 3


@dataclass(frozen=True)
class _Pair:
    """A site, the ReLU behind it, and the sites that are all that reads it."""

    maker: NetworkSite
    value: str
    relu: str
    readers: tuple[NetworkSite, ...]


def absorbed(network: Network, batches: Sequence[Any]) -> tuple[Network, Mapping[str, int]]:
    """relu(W1 x + b1) before W2, b2:  b1 <- b1 - c,  b2 <- b2 + W2 c  with c = max(0, min(mean - 3 deviation,
    smallest)) of each channel of W1 x + b1 over `batches`, so that on them nothing is cut off anew.

    A convolution that pads with zeros would miss c at its edges: it is left alone. Returns the network and, by the
    name of the value behind the ReLU, in how many channels c is above 0.
    """
    pairs = list(_pairs(network))
    if not pairs:
        return network, {}
    constants = _constants(network, pairs, batches)
    changed = network.copied()
    counts = {}
    for pair in pairs:
        c = constants[pair.value]
        if bool((c > 0).any()):
            counts[pair.relu] = int((c > 0).sum())
            _move_(changed, pair, c)
    return changed, counts


def _pairs(network: Network) -> Iterator[_Pair]:
    sites = {node: site for site in network.sites for node in site.nodes}
    for node in network.graph.graph.nodes:
        if node.target != torch.ops.aten.relu.default:
            continue
        source = node.all_input_nodes[0]
        maker = sites.get(source.name)
        readers = [sites.get(user.name) for user in node.users]
        if maker is None or len(source.users) > 1 or not _can_move(network, maker) or not readers:
            continue
        found = [
            site for site in readers if site is not None and _can_move(network, site) and _pads_nothing(network, site)
        ]
        if len(found) == len(readers) and maker not in found:
            yield _Pair(maker, source.name, node.name, tuple(found))


def _can_move(network: Network, site: NetworkSite) -> bool:
    return site.kind in ("linear", "conv", "conv_transpose") and len(site.nodes) == 1 and not site.tied


def _pads_nothing(network: Network, site: NetworkSite) -> bool:
    """Every output sees the whole kernel."""
    module = network.graph.get_submodule(site.name)
    if site.kind == "linear":
        return True
    return site.kind == "conv" and not isinstance(module.padding, str) and not any(module.padding)  # type: ignore[arg-type]


def _axis(site: NetworkSite, value: Tensor) -> int:
    return value.dim() - 1 if site.kind == "linear" else value.dim() - len(site.shape) + 1


def _constants(network: Network, pairs: Sequence[_Pair], batches: Sequence[Any]) -> dict[str, Tensor]:
    """c float64 [channels] by the value before the ReLU."""
    wanted = {pair.value: pair.maker for pair in pairs}
    sums: dict[str, Tensor] = {}
    lowest: dict[str, Tensor] = {}
    for batch in batches:
        for name, value in Recorder.values(network, network.inputs(batch), frozenset(wanted)).items():
            x = value.movedim(_axis(wanted[name], value), 0).flatten(1).double()
            moments = torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])
            sums[name] = moments + sums.get(name, 0)
            lowest[name] = torch.minimum(x.amin(1), lowest.get(name, x.amin(1)))
    found = {}
    for name, (count, total, square) in sums.items():
        mean = total / count
        deviation = (square / count - mean.square()).clamp_min(0).sqrt()
        found[name] = torch.minimum(mean - _DEVIATIONS * deviation, lowest[name]).clamp_min(0)
    return found


def _move_(network: Network, pair: _Pair, c: Tensor) -> None:
    with torch.no_grad():
        _add_to_bias_(network, pair.maker, -c)
        for site in pair.readers:
            matrix = site.matrix(network.weight(site).detach()).double()
            columns = c.reshape(site.groups, -1).repeat_interleave(matrix.shape[1] // (len(c) // site.groups), 1)
            _add_to_bias_(
                network, site, (matrix.reshape(site.groups, -1, matrix.shape[1]) * columns[:, None]).sum(2).flatten()
            )


def _add_to_bias_(network: Network, site: NetworkSite, added: Tensor) -> None:
    module = network.graph.get_submodule(site.name)
    weight = network.weight(site)
    bias = module.bias
    old = torch.zeros_like(added) if not isinstance(bias, Tensor) else bias.detach().double()
    module.bias = nn.Parameter((old + added).to(weight.dtype), requires_grad=weight.requires_grad)
