"""A network as a graph: its weight matrices are sites, the numbers that pass between its operations are values."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

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


@dataclass(frozen=True)
class Inputs:
    """What a network is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(batch: Any) -> Inputs:
        """A tensor is the one argument, a tuple or list are the arguments in order, a mapping those by name.

        Raises DataError for anything else.
        """
        if isinstance(batch, Inputs):
            return batch
        if isinstance(batch, Tensor):
            return Inputs((batch,))
        if isinstance(batch, tuple | list) and all(isinstance(part, Tensor) for part in batch):
            return Inputs(tuple(batch))
        if isinstance(batch, Mapping):
            return Inputs((), dict(batch))
        raise DataError(
            f"a batch of type {type(batch).__name__}: give a tensor, a tuple of tensors, or tensors by argument name"
        )


@dataclass(frozen=True)
class Network:
    """graph    a module whose convolutions, linear maps, embeddings, batch norms and dropouts are torch's own modules
             under their original paths and whose other operations are calls; never edited: `copied` gives one for that
    sites    in the order in which they are first computed with
    example  inputs that it was captured with
    dynamic  which of their axes may vary, as torch.export takes it, or None for none
    """

    graph: fx.GraphModule
    sites: tuple[NetworkSite, ...]
    example: Inputs
    dynamic: Any = None

    def copied(self) -> Network:
        """The same with tensors and graph of its own."""
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

    def inputs(self, batch: Any) -> Inputs:
        """The part of a batch of a loader that goes in: of a longer tuple, whose rest are labels, the first ones."""
        given = Inputs.of(batch)
        return Inputs(given.args[: len(self.example.args)], given.kwargs)

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
