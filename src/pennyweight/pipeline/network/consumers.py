"""What rounding a value does to those that compute with it: where its error is looked at."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, fx

from pennyweight.containers.onnx.operations import clamp_of
from pennyweight.models.network.network import Network


@dataclass(frozen=True)
class Consumers:
    """nodes  names of what is computed between a value and where its error is looked at, in the order of the graph
    ends   names of the values where it is looked at: among `nodes`, or the value itself
    reads  names of all other values that `nodes` read
    """

    nodes: tuple[str, ...]
    ends: tuple[str, ...]
    reads: tuple[str, ...]


def consumers_of(network: Network, value: str, edges: Collection[str]) -> Consumers:
    """From `value` on through operations of one tensor up to, on each path, a site and the clamps behind it, an
    operation that combines tensors, another one of `edges`, or the end of the network."""
    sites = {name for site in network.sites for name in site.nodes}
    graph_nodes = {node.name: node for node in network.graph.graph.nodes}
    inside: set[fx.Node] = set()
    ends: dict[str, None] = {}
    waiting = [graph_nodes[value]]
    while waiting:
        here = waiting.pop()
        for user in here.users:
            if user.op == "output":
                ends[here.name] = None
                continue
            path = _with_clamps(user) if user.name in sites else [user]
            inside.update(path)
            is_end = user.name in sites or user.name in edges or _combines(user)
            if is_end:
                ends[path[-1].name] = None
            else:
                waiting.append(user)
    ordered = [node for node in graph_nodes.values() if node in inside]
    read = {x.name for node in ordered for x in node.all_input_nodes if x.op != "get_attr"}
    outside = read - {node.name for node in ordered} - {value}
    return Consumers(tuple(node.name for node in ordered), tuple(ends), tuple(sorted(outside)))


def _with_clamps(node: fx.Node) -> list[fx.Node]:
    """`node` and the clamps that alone read it, one behind the other: what they cut off is no error."""
    path = [node]
    while len(path[-1].users) == 1:
        user = next(iter(path[-1].users))
        if clamp_of(user) is None:
            break
        path.append(user)
    return path


def _combines(node: fx.Node) -> bool:
    """Whether it reads more than one tensor that is computed."""
    values = [x.meta.get("val") for x in node.all_input_nodes if x.op != "get_attr"]
    return sum(value is None or isinstance(value, Tensor) for value in values) > 1
