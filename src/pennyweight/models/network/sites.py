"""The weight matrices of a captured network."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network.lift import bound_arguments
from pennyweight.models.network.network import NetworkSite, NetworkSiteKind, module_calls

aten = torch.ops.aten
_KINDS: dict[type[nn.Module], NetworkSiteKind] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose"),
}
_RECURRENT = (aten.lstm.input, aten.gru.input)


def find_sites(graph: fx.GraphModule) -> tuple[NetworkSite, ...]:
    """All weights of linear maps, convolutions, embeddings, LSTMs and GRUs, each once, in the order of the graph."""
    found: dict[Tensor, NetworkSite] = {}
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    places: dict[str, int] = {}
    for node, site, weight in _uses(graph):
        places.setdefault(site.name, order[node])
        known = found.get(weight)
        if known is None:
            found[weight] = site
            continue
        other = () if site.parameter in (known.parameter, *known.tied) else (site.parameter,)
        found[weight] = replace(known, nodes=(*known.nodes, node.name), tied=(*known.tied, *other))
    return tuple(sorted(found.values(), key=lambda site: places[site.name]))


def _uses(graph: fx.GraphModule) -> list[tuple[fx.Node, NetworkSite, Tensor]]:
    uses: list[tuple[fx.Node, NetworkSite, Tensor]] = []
    for node, module in module_calls(graph):
        kind = _KINDS.get(type(module))
        if kind is None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        groups = getattr(module, "groups", 1)
        path = str(node.target)
        site = NetworkSite(path, kind, f"{path}.weight", tuple(weight.shape), groups, (node.name,))
        uses.append((node, site, weight))
    for node in graph.graph.nodes:
        if node.target in _RECURRENT:
            uses += [(node, site, graph.get_parameter(site.parameter)) for site in _recurrent(graph, node)]
    return uses


def _recurrent(graph: fx.GraphModule, node: fx.Node) -> list[NetworkSite]:
    """The matrices of an LSTM or GRU: its parameters with two axes."""
    sites = []
    for read in bound_arguments(node)["params"]:
        if not isinstance(read, fx.Node) or read.op != "get_attr":
            continue
        path = str(read.target)
        shape = tuple(graph.get_parameter(path).shape)
        if len(shape) == 2:
            sites.append(NetworkSite(path, "recurrent", path, shape, nodes=(node.name,)))
    return sites
