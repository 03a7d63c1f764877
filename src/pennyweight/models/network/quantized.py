"""A network with codes for its weights and parameters for its edges: what a container writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from pennyweight.formats.integer import Int
from pennyweight.models.network.identity import value_read
from pennyweight.models.network.network import Network, with_weight
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme


@dataclass(frozen=True)
class QuantizedNetwork:
    """network      the float network, batch norms folded, as it was before its weights were rounded; biases corrected
    weights      site name -> its codes; sites left out stay in float
    activations  value name -> scale and zero point of the edge, static
    plan         scheme of each site, why others are kept, and the activation scheme of each edge; a dynamic one has no
                 parameters in `activations`
    """

    network: Network
    weights: Mapping[str, QuantizedWeight]
    activations: Mapping[str, ActivationParameters] = field(default_factory=dict)
    plan: Plan = field(default_factory=lambda: Plan({}))

    def simulated(self) -> fx.GraphModule:
        """A module that computes in float with the decoded weights and rounds the values on edges.

        The result of the arithmetic of a runtime with integers differs from it by the rounding of float sums alone.
        """
        graph = self.network.copied().graph
        for site in self.network.sites:
            if site.name in self.weights:
                with_weight(site, graph, site.tensor(self.weights[site.name].dequantize()))
        linear = linear_maps(self.network, self.weights)
        for name, scheme in self.plan.edges.items():
            parameters = self.activations.get(name)
            if scheme.is_dynamic or parameters is None:
                put_behind(graph, name, RoundedDynamically(scheme), f"{name}_rounded", linear)
            else:
                put_behind(graph, name, Rounded(parameters), f"{name}_rounded")
        graph.graph.lint()
        graph.recompile()
        return graph


class Rounded(nn.Module):
    """The values that a reader of the codes sees."""

    def __init__(self, parameters: ActivationParameters) -> None:
        super().__init__()
        self.parameters_ = parameters

    def forward(self, x: Tensor) -> Tensor:
        return self.parameters_.round_trip(x).to(x.dtype)


class RoundedDynamically(nn.Module):
    """The same with the range of each tensor, as ONNX's DynamicQuantizeLinear takes it: in float32."""

    def __init__(self, scheme: ActivationScheme) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        return dynamic_parameters(x, self.scheme.element).round_trip(x).to(x.dtype)


def dynamic_parameters(x: Tensor, element: Int) -> ActivationParameters:
    """scale = (max - min) / steps, zero = clamp(round(smallest - min / scale)), ties to even, all in float32; the range
    holds 0, and a tensor of zeros has the scale 1."""
    low, high = x.detach().min().float().clamp_max(0), x.detach().max().float().clamp_min(0)
    scale = (high - low) / torch.tensor(element.largest - element.smallest)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (element.smallest - low / scale).round().clamp(element.smallest, element.largest)
    return ActivationParameters(float(scale), int(zero), element)


def linear_maps(network: Network, sites: Collection[str]) -> set[str]:
    """Nodes that multiply by the weight of a linear map of `sites`: what a dynamic edge is rounded for."""
    return {name for site in network.sites if site.kind == "linear" and site.name in sites for name in site.nodes}


def put_behind(
    graph: fx.GraphModule, value: str, module: nn.Module, name: str, readers: Collection[str] | None = None
) -> None:
    """Let `readers` (None: all nodes) of `value` read `module` of it, which is put into `graph` as `name`."""
    graph.add_module(name, module)
    nodes = {node.name: node for node in graph.graph.nodes}
    if readers is None:
        _insert_call(graph, nodes[value], name)
        return
    # Between the value and a reader may lie a dropout, which is one while it is trained.
    reading = [node for node in nodes.values() if node.name in readers and value_read(node) == value]
    for source in dict.fromkeys(node.args[0] for node in reading):
        assert isinstance(source, fx.Node)
        _insert_call(graph, source, name, lambda node: node.name in readers)


def _insert_call(
    graph: fx.GraphModule, node: fx.Node, name: str, reads: Callable[[fx.Node], bool] = lambda node: True
) -> None:
    """Let every node that reads `node`, and of which `reads` is true, read the module `name` of it."""
    with graph.graph.inserting_after(_last_placeholder(node)):
        call = graph.graph.call_module(name, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call and reads(user))


def _last_placeholder(node: fx.Node) -> fx.Node:
    """`node`, or the last input where it is one: inputs come first in a graph."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node
