"""A network computed node after node, each over all calibration batches, before the next one begins.

So the weights of a site can be chosen when what it reads is known, and before anything that reads it is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from pennyweight.core.errors import DataError
from pennyweight.models.network.network import Inputs, Network
from pennyweight.pipeline.network.shelf import Shelf


class Walk:
    """The values of a graph on a few batches, as long as some node that is still to come reads them.

    network   whose graph is computed; its weights may be changed where they have not been read yet
    at        name of a value -> what it is in each batch; edited by whoever rounds it
    """

    def __init__(self, network: Network, batches: Sequence[Inputs], shelf: Shelf | None = None) -> None:
        self.network, self._shelf = network, shelf
        self.nodes = {node.name: node for node in network.graph.graph.nodes}
        [self._output] = [node for node in self.nodes.values() if node.op == "output"]
        self.at: dict[str, list[Any]] = {}
        self._places = {name: place for place, name in enumerate(self.nodes)}
        self._readers = Counter({name: len(node.users) for name, node in self.nodes.items()})
        self._arguments = arguments_of(network, batches)
        self.batches = len(batches)

    def inputs(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of the node `name`, positional and by keyword, in each batch."""
        node = self.nodes[name]
        return [self.value((node.args, node.kwargs), batch) for batch in range(self.batches)]

    def advance(self, name: str) -> list[Any]:
        """Compute the node `name`, whose arguments are there, let go of what nobody reads any more, and return the
        values of all batches."""
        node = self.nodes[name]
        with torch.no_grad():
            made = [self._computed(node, batch) for batch in range(self.batches)]
        if self._shelf is not None:
            made = self._shelf.put(made)
        return self.adopt(name, made)

    def adopt(self, name: str, values: list[Any]) -> list[Any]:
        """Take `values` for what the node `name` gives, without computing it."""
        self.at[name] = values
        for read in self.nodes[name].all_input_nodes:
            self.release(read.name)
        if not self._readers[name]:
            self.at.pop(name)
        return values

    def put(self, name: str, values: list[Any]) -> None:
        """Let the readers of `name` that are still to come read `values`."""
        if name in self.at:
            self.at[name] = values if self._shelf is None else self._shelf.put(values)

    def again(self, names: Sequence[str], given: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """The nodes `names`, in order, computed once more in one batch with `given` values in place of those that they
        had; what else they read is there."""
        values = dict(given)
        with torch.no_grad():
            for name in names:
                values[name] = self._again(self.nodes[name], values, batch)
        return values

    def result(self, rest: Sequence[str], batch: int) -> Any:
        """What the output node has in one batch: `rest` is computed now, all that it reads besides is there."""
        left = Counter(read.name for name in rest for read in self.nodes[name].all_input_nodes)
        values: dict[str, Any] = {}
        with torch.no_grad():
            for name in rest:
                node = self.nodes[name]
                values[name] = self._again(node, values, batch)
                for read in node.all_input_nodes:
                    left[read.name] -= 1
                    if not left[read.name] and read not in self._output.all_input_nodes:
                        values.pop(read.name, None)
        return fx.map_arg(self._output.args[0], lambda node: self._value(node, values, batch))

    def _again(self, node: fx.Node, values: Mapping[str, Any], batch: int) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return self._computed(node, batch)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: self._value(read, values, batch))
        return self._called(node)(*args, **kwargs)

    def _value(self, node: fx.Node, values: Mapping[str, Any], batch: int) -> Any:
        if node.op == "get_attr":
            return constant(self.network.graph, node)
        return values[node.name] if node.name in values else self.at[node.name][batch]

    def hold(self, name: str) -> None:
        """Keep the value `name` until it is released once more than its readers do."""
        self._readers[name] += 1

    def release(self, name: str) -> None:
        self._readers[name] -= 1
        if self._readers[name] <= 0:
            self.at.pop(name, None)

    def value(self, arguments: Any, batch: int) -> Any:
        """What arguments of a node that is still to come are in one batch: nodes, or lists of them and others."""

        return fx.map_arg(arguments, lambda node: self._value(node, {}, batch))

    def place(self, name: str) -> int:
        """Which node of the graph `name` is."""
        return self._places[name]

    def _computed(self, node: fx.Node, batch: int) -> Any:
        if node.op == "placeholder":
            return self._arguments[batch][node.name]
        if node.op in ("get_attr", "output"):
            return None
        args, kwargs = self.value(node.args, batch), self.value(node.kwargs, batch)
        return self._called(node)(*args, **kwargs)

    def _called(self, node: fx.Node) -> Any:
        return self.network.graph.get_submodule(str(node.target)) if node.op == "call_module" else node.target


def constant(graph: fx.GraphModule, node: fx.Node) -> Any:
    """What a get_attr node reads."""
    found: Any = graph
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def arguments_of(network: Network, batches: Sequence[Inputs]) -> list[dict[str, Any]]:
    """What each batch gives to the inputs of the graph, by the names of their nodes.

    Raises DataError for a batch with other arguments than the network was captured with.
    """
    names = network.argument_names
    found = []
    for number, batch in enumerate(batches):
        leaves = pytree.tree_leaves((batch.args, {name: batch.kwargs.get(name) for name in network.example.kwargs}))
        if len(leaves) != len(names):
            raise DataError(
                f"calibration batch {number} has {len(leaves)} inputs; the network was captured with "
                f"{', '.join(names)}: give batches like the example"
            )
        found.append(dict(zip(names, leaves, strict=True)))
    return found
