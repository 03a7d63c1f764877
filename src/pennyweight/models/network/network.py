"""A network as a graph: its weight matrices are sites, the numbers that pass between its operations are values."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pennyweight.core.errors import DataError

NetworkSiteKind = Literal["linear", "conv", "conv_transpose", "embedding", "recurrent"]


@dataclass(frozen=True)
class NetworkSite:
    """One weight of a network, as the matrix that is quantized.

    name       path of the module that holds it, "layer1.0.conv1"; of a recurrent weight its own, "lstm.weight_ih_l0"
    parameter  path of the tensor, "layer1.0.conv1.weight"
    shape      of that tensor, as torch has it
    groups     of a convolution: rows of the matrix are cut into so many parts that read different channels
    nodes      the nodes of the graph that compute with it, in order; more than one where a module is called again
    tied       paths of other modules' parameters that are the same tensor
    """

    name: str
    kind: NetworkSiteKind
    parameter: str
    shape: tuple[int, ...]
    groups: int = 1
    nodes: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[out, in]: of a convolution [channels out, channels in of a group x kernel positions]."""
        if self.kind == "conv_transpose":
            outputs = self.shape[1] * self.groups
            return outputs, prod(self.shape) // max(1, outputs)
        return self.shape[0], prod(self.shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        """`weight` as torch has it -> [out, in]."""
        if self.kind != "conv_transpose":
            return weight.reshape(self.matrix_shape)
        # [in, out of a group, kernel...]: the channels in of a group beside the kernel, those out of all groups first.
        parts = weight.reshape(self.groups, self.shape[0] // self.groups, self.shape[1], -1)
        return parts.transpose(1, 2).reshape(self.matrix_shape)

    def tensor(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if self.kind != "conv_transpose":
            return matrix.reshape(self.shape)
        parts = matrix.reshape(self.groups, self.shape[1], self.shape[0] // self.groups, -1)
        return parts.transpose(1, 2).reshape(self.shape)


_ALLOWED = "give a tensor, a tuple of tensors, or a mapping from names of arguments to tensors"


@dataclass(frozen=True)
class Inputs:
    """What a network is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(batch: Any) -> Inputs:
        """A tensor is the one argument, a tuple or list are the arguments in order, a mapping those by name, whose
        values may also be None, numbers and texts, and lists or mappings of all these.

        Raises DataError for anything else, and for a batch without a tensor.
        """
        if isinstance(batch, Inputs):
            return batch
        given = Inputs._split(batch)
        for name, part in [*enumerate(given.args), *given.kwargs.items()]:
            allowed = (Tensor, int, float, str, type(None)) if given.kwargs else Tensor
            for leaf in pytree.tree_leaves(part):
                if not isinstance(leaf, allowed):
                    raise DataError(f"input {name} of a batch is of type {type(leaf).__name__}: {_ALLOWED}")
        if not given.tensors:
            raise DataError(f"a batch without a tensor: {_ALLOWED}")
        return given

    @staticmethod
    def _split(batch: Any) -> Inputs:
        if isinstance(batch, Tensor):
            return Inputs((batch,))
        if isinstance(batch, tuple | list):
            return Inputs(tuple(batch))
        if isinstance(batch, Mapping):
            return Inputs((), dict(batch))
        raise DataError(f"a batch of type {type(batch).__name__}: {_ALLOWED}")

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the graph's inputs."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class InputValue:
    """A tensor that a network takes; the size of an axis is None where any will do."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]


def known_size(size: Any) -> int | None:
    """The length of an axis of a traced value; None where it may vary."""
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
        return None if known is None else int(known)
    return int(size)


@dataclass(frozen=True)
class Network:
    """graph    a module whose convolutions, linear maps, embeddings, batch norms and dropouts are torch's own modules
             under their original paths and whose other operations are calls; never edited: `copied` gives one for that
    sites    in the order in which they are first computed with
    example  inputs that it was captured with
    dynamic  which of their axes may vary, as torch.export takes it, or None for none
    refused  name of a node that computes with a parameter but is no site -> why
    """

    graph: fx.GraphModule
    sites: tuple[NetworkSite, ...]
    example: Inputs
    dynamic: Any = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def copied(self) -> Network:
        """The same with tensors and graph of its own."""
        with warnings.catch_warnings():
            # Of torch about how it copies the structure of inputs.
            warnings.simplefilter("ignore", FutureWarning)
            return replace(self, graph=copy.deepcopy(self.graph))

    def site(self, name: str) -> NetworkSite:
        return next(site for site in self.sites if site.name == name)

    def weight(self, site: NetworkSite) -> nn.Parameter:
        """The tensor of `site` in the graph, as torch has it."""
        return self.graph.get_parameter(site.parameter)

    @property
    def argument_names(self) -> tuple[str, ...]:
        """Names of the values that come in, in order."""
        return tuple(node.name for node in self.graph.graph.nodes if node.op == "placeholder")

    @property
    def input_values(self) -> dict[str, InputValue]:
        """The tensors that come in, by name, in order."""
        values = {node.name: node.meta.get("val") for node in self.graph.graph.nodes if node.op == "placeholder"}
        return {
            name: InputValue(value.dtype, tuple(map(known_size, value.shape)))
            for name, value in values.items()
            if isinstance(value, Tensor)
        }

    @property
    def batch_varies(self) -> bool:
        """Whether the first axis of every input may have any size; else batches are as large as the example."""
        return all(size is None for value in self.input_values.values() for size in value.shape[:1])

    def inputs(self, batch: Any) -> Inputs:
        """The part of a batch of a loader that goes in: of a longer tuple, whose rest are labels, the first ones; of a
        mapping, or (mapping, labels), the arguments that the example has."""
        if isinstance(batch, tuple | list):
            own = len(self.example.args)
            batch = batch[:own] if own or not batch else batch[0]
        given = Inputs.of(batch)
        names = [name for name in self.example.kwargs if name in given.kwargs]
        return Inputs(given.args, {name: given.kwargs[name] for name in names})

    def in_order(self, inputs: Inputs) -> tuple[Any, ...]:
        """`inputs` as the graph's placeholders take them."""
        return (*inputs.args, *(inputs.kwargs[name] for name in self.argument_names[len(inputs.args) :]))

    def __call__(self, batch: Any) -> Any:
        given = self.inputs(batch)
        return self.graph(*given.args, **given.kwargs)


def module_calls(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module]]:
    """The nodes that call a module, with it, in order."""
    for node in graph.graph.nodes:
        if node.op == "call_module":
            yield node, graph.get_submodule(str(node.target))


def with_weight(site: NetworkSite, graph: fx.GraphModule, weight: Tensor) -> None:
    """Put `weight`, shaped as torch has it, into the place of `site` in `graph`, tied places included."""
    with torch.no_grad():
        graph.get_parameter(site.parameter).copy_(weight)
