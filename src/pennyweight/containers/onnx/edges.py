"""Which values of a network are rounded, so that ONNX Runtime computes with integers between them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from pennyweight.containers.onnx.operations import clamp_of, integer_operands, is_real, moved
from pennyweight.models.network.identity import before_identities, is_identity
from pennyweight.models.network.network import Network


@dataclass(frozen=True)
class Edge:
    """A value that is rounded.

    value   name of its node
    source  name of the value whose scale and zero point it has: its own, or that of an edge whose numbers it only moves
    """

    value: str
    source: str


def edges_of(network: Network, *, sites: Collection[str], is_dynamic: bool = False) -> tuple[Edge, ...]:
    """The values that are rounded when the sites `sites` are quantized, in the order of the graph.

    What enters a convolution or a linear map of `sites` is rounded, and what leaves such a convolution: ONNX Runtime
    has no kernel for it that gives floats. Between these an addition, a product, a concatenation, an average, a sigmoid
    or a leaky ReLU computes with integers where all that it reads can be had as integers and its result is needed as
    such. A clamp behind one of them (ReLU, ReLU6) belongs to it: the value between is not rounded. All else stays in
    float, and so does what a linear map gives to it or to the caller. With `is_dynamic` only what enters linear maps is
    rounded.
    """
    nodes = list(network.graph.graph.nodes)
    makers = _Makers(network, sites)
    rounded = {before_identities(x) for node in nodes if makers.reads_integers(node, is_dynamic) for x in _inputs(node)}
    if not is_dynamic:
        rounded |= {end_of(node) for node in nodes if node.name in makers.convolutions}
        while more := _needed(nodes, makers, rounded) - rounded:
            rounded |= more
    sources: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in rounded:
            sources[node] = node if is_dynamic else _source(node, sources)
    return tuple(Edge(value.name, source.name) for value, source in sources.items())


class _Makers:
    """The nodes that compute with sites that are quantized."""

    def __init__(self, network: Network, sites: Collection[str]) -> None:
        chosen = [site for site in network.sites if site.name in sites]
        self.convolutions = {name for site in chosen if site.kind == "conv" for name in site.nodes}
        self.linears = {name for site in chosen if site.kind == "linear" for name in site.nodes}

    def reads_integers(self, node: fx.Node, is_dynamic: bool) -> bool:
        return node.name in self.linears or (node.name in self.convolutions and not is_dynamic)


def _inputs(node: fx.Node) -> list[fx.Node]:
    return [x for x in node.all_input_nodes if is_real(x)]


def end_of(node: fx.Node) -> fx.Node:
    """The last of the clamps that alone read `node`, or `node` itself."""
    end = here = node
    while len(here.users) == 1:
        here = next(iter(here.users))
        if clamp_of(here) is not None:
            end = here
        elif not is_identity(here):
            break
    return end


def begin_of(node: fx.Node) -> fx.Node:
    """The inverse of `end_of`."""
    begin = here = node
    while (before := clamp_of(here) or (moved(here) if is_identity(here) else None)) and len(before.users) == 1:
        begin = here = before
    return begin


def _needed(nodes: list[fx.Node], makers: _Makers, rounded: set[fx.Node]) -> set[fx.Node]:
    """What an operation that computes with integers reads and gives, for each whose result is needed as integers."""
    can = _can_be_integers(nodes, makers, rounded)
    found: set[fx.Node] = set()
    for value in rounded:
        end = _before_moves(value)
        maker = begin_of(end)
        operands = integer_operands(maker)
        if all(can[x] for x in operands) if operands else maker.name in makers.linears:
            found |= {end, *(before_identities(x) for x in operands)}
    return found


def _can_be_integers(nodes: list[fx.Node], makers: _Makers, rounded: set[fx.Node]) -> dict[fx.Node, bool]:
    """Whether each value is rounded, or comes from integers alone without a number that is made in float."""
    can: dict[fx.Node, bool] = {}
    for node in nodes:
        operands = integer_operands(node)
        source = clamp_of(node) or moved(node)
        has_integers = all(can[x] for x in operands) if operands else source is not None and can[source]
        can[node] = node in rounded or node.name in makers.linears or has_integers
    return can


def _before_moves(node: fx.Node) -> fx.Node:
    """The value whose numbers `node` only moves."""
    while (source := moved(node)) is not None:
        node = source
    return node


def _source(node: fx.Node, sources: dict[fx.Node, fx.Node]) -> fx.Node:
    """The edge whose numbers `node` only moves, or `node` itself."""
    here: fx.Node | None = node
    while here is not None:
        if here in sources:
            return sources[here]
        here = moved(here)
    return node
