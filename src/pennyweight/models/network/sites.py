"""The weight matrices of a captured network."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network.lift import bound_arguments
from pennyweight.models.network.network import NetworkSite, NetworkSiteKind, module_calls
from pennyweight.models.network.recurrent import RECURRENT

_KINDS: dict[type[nn.Module], NetworkSiteKind] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose"),
}


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
        if node.target in RECURRENT:
            uses += [(node, site, graph.get_parameter(site.parameter)) for site in _recurrent(graph, node)]
    return uses


def _recurrent(graph: fx.GraphModule, node: fx.Node) -> list[NetworkSite]:
    """The matrices of an LSTM or GRU: its parameters with two axes."""
    paths = [str(read.target) for read in bound_arguments(node)["params"] if _is_parameter(read)]
    shapes = {path: tuple(graph.get_parameter(path).shape) for path in paths}
    return [
        NetworkSite(path, "recurrent", path, shape, nodes=(node.name,))
        for path, shape in shapes.items()
        if len(shape) == 2
    ]


def find_refused(graph: fx.GraphModule) -> dict[str, str]:
    """The calls that compute with parameters and are no sites, by the name of the node, with the reason."""
    reasons = {node: _why_refused(node) for node in graph.graph.nodes if node.op == "call_function"}
    return {node.name: reason for node, reason in reasons.items() if reason is not None}


def _why_refused(node: fx.Node) -> str | None:
    name = str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else ""
    weight = bound_arguments(node).get("weight") if name in _WITH_WEIGHT else None
    if isinstance(weight, fx.Node) and weight.op != "get_attr" and _reads_parameter(weight):
        return (
            f"its weight is computed ({weight.name}): bake it in before the network is captured, as "
            "torch.nn.utils.parametrize.remove_parametrizations and torch.nn.utils.remove_weight_norm do"
        )
    if node.target in RECURRENT:
        computed = [read.name for read in bound_arguments(node)["params"] if not _is_parameter(read)]
        return f"its weights {', '.join(computed)} are no parameters" if computed else None
    if name in _CELLS or isinstance(weight, fx.Node):
        return f"no container stores the weight of {name} in low bits"
    if name in _PRODUCTS and any(_is_parameter(read) for read in node.all_input_nodes):
        return "a matrix product with a parameter: use torch.nn.Linear to have it quantized"
    return None


_WITH_WEIGHT = frozenset(
    {"linear", "embedding", "embedding_bag", "bilinear", "conv1d", "conv2d", "conv3d"}
    | {f"conv_transpose{axes}d" for axes in (1, 2, 3)}
)
_CELLS = frozenset({"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "lstm", "gru", "rnn_tanh", "rnn_relu"})
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "mv", "addmv"})


def _is_parameter(node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    graph = node.graph.owning_module
    assert graph is not None
    return any(name == node.target for name, _ in graph.named_parameters(remove_duplicate=False))


def _reads_parameter(node: fx.Node) -> bool:
    """Whether any parameter goes into what `node` computes."""
    return _is_parameter(node) or any(_reads_parameter(source) for source in node.all_input_nodes)
