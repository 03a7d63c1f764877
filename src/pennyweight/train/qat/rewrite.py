"""A captured network whose weights and edges are rounded where a plan says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network.fold import NORMS, Norm
from pennyweight.models.network.network import Network, NetworkSite
from pennyweight.models.network.quantized import linear_maps, put_behind
from pennyweight.train.qat.folded import FoldedSite, norms_of
from pennyweight.train.qat.operations import Operation
from pennyweight.train.qat.planned import Planned
from pennyweight.train.qat.prepared import Preparation, remember
from pennyweight.train.qat.statistics import LoneNorm
from pennyweight.train.qat.weights import WeightRounding


def rewritten(
    network: Network, wanted: Planned, weights: Mapping[str, WeightRounding], edges: Mapping[str, nn.Module]
) -> fx.GraphModule:
    """A trainable copy of the graph of `network`: every tensor keeps its name, every value that of the network whose
    batch norms are folded.

    weights   site -> how it is rounded; sites left out stay in float
    edges     value -> how it is rounded, those of `wanted.sources` that are their own sources
    """
    work = _Rewriting(network.copied(), weights)
    folds = norms_of(work.network)
    for site in network.sites:
        if site.name in folds:
            work.fold(site, *folds[site.name])
        elif site.name in weights:
            work.round(site)
    work.take_lone_norms()
    work.take_copies()
    paths = {name: f"{name}_rounding" for name in edges}
    linear = linear_maps(network, weights)
    for value, source in wanted.sources.items():
        readers = linear if wanted.plan.edges[value].is_dynamic else None
        put_behind(work.network.graph, value, edges[source], paths[source], readers)
    work.graph.lint()
    # Made anew it holds what the graph reads and nothing else, as a copy of it would.
    model = fx.GraphModule(work.network.graph, work.graph)
    made = Preparation(network, wanted.plan, wanted.sources, work.roundings, paths, work.norms, work.folded)
    remember(model, made)
    model.train()
    return model


@dataclass(frozen=True)
class _Rewriting:
    """The graph of `network` while it is edited, and the paths of what was put into it."""

    network: Network
    weights: Mapping[str, WeightRounding]
    roundings: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.network.graph.graph

    def round(self, site: NetworkSite) -> None:
        """Let all that computes with the weight of `site` read it rounded."""
        path = self._put(f"{site.parameter}_rounding", _OfTensor(site, self.weights[site.name]))
        self.roundings[site.name] = f"{path}.rounding"
        if site.kind == "recurrent":
            for node in list(self.graph.nodes):
                if node.op == "get_attr" and node.target in (site.parameter, *site.tied):
                    self._behind(node, path)
            return
        first = self._node(site.nodes[0])
        with self.graph.inserting_before(first):
            rounded = self.graph.call_module(path, (self.graph.get_attr(site.parameter),))
        for name in site.nodes:
            node = self._node(name)
            operation = Operation.of(self._module(node))
            with self.graph.inserting_before(node):
                bias = [self._read(node, "bias")] if operation.has_bias else []
                arguments = (node.args[0], rounded, *bias)
                call = self.graph.call_function(operation.function, arguments, dict(operation.settings))
            self._replace(node, call)

    def fold(self, site: NetworkSite, norm_node: fx.Node, norm: Norm) -> None:
        """One module in place of the site and the batch norm behind it, under the name of the site's value."""
        node = self._node(site.nodes[0])
        rounding = self.weights.get(site.name)
        module = FoldedSite(site, Operation.of(self._module(node)), norm, rounding)
        path = self._put(f"{site.parameter}_rounding", module)
        norm_path = str(norm_node.target)
        self.norms[norm_path], self.folded[site.name] = f"{path}.statistics", norm_path
        if rounding is not None:
            self.roundings[site.name] = f"{path}.rounding"
        with self.graph.inserting_before(norm_node):
            own = (node.args[0], self.graph.get_attr(site.parameter), self._read(node, "bias"))
            call = self.graph.call_module(path, (*own, *self._norm_tensors(norm_node)))
        norm_node.replace_all_uses_with(call)
        self.graph.erase_node(norm_node)
        self._replace(node, call)

    def take_lone_norms(self) -> None:
        """Batch norms that are part of no site follow the same switches."""
        for node in list(self.graph.nodes):
            norm = self._module(node) if node.op == "call_module" else None
            # Without running statistics there is nothing to switch.
            if not isinstance(norm, NORMS) or norm.running_mean is None:
                continue
            norm_path = str(node.target)
            path = f"{norm_path}_norm"
            if norm_path not in self.norms:
                self._put(path, LoneNorm(norm))
                self.norms[norm_path] = f"{path}.statistics"
            with self.graph.inserting_before(node):
                call = self.graph.call_module(path, (node.args[0], *self._norm_tensors(node)))
            self._replace(node, call)

    def take_copies(self) -> None:
        """torch has no gradient for the operation that a graph has in place of an assignment."""
        for node in list(self.graph.nodes):
            if node.target is torch.ops.aten.copy.default:
                with self.graph.inserting_before(node):
                    call = self.graph.call_function(_copied, node.args[:2])
                self._replace(node, call)

    def _node(self, name: str) -> fx.Node:
        found: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return found

    def _module(self, node: fx.Node) -> nn.Module:
        return self.network.graph.get_submodule(str(node.target))

    def _put(self, path: str, module: nn.Module) -> str:
        self.network.graph.add_submodule(path, module)
        return path

    def _read(self, node: fx.Node, name: str) -> fx.Node | None:
        """The tensor `name` of the module that `node` calls."""
        tensor = getattr(self._module(node), name)
        return self.graph.get_attr(f"{node.target}.{name}") if isinstance(tensor, Tensor) else None

    def _norm_tensors(self, node: fx.Node) -> tuple[fx.Node | None, ...]:
        return tuple(self._read(node, name) for name in ("weight", "bias", "running_mean", "running_var"))

    def _behind(self, node: fx.Node, path: str) -> None:
        with self.graph.inserting_after(node):
            call = self.graph.call_module(path, (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)

    def _replace(self, node: fx.Node, call: fx.Node) -> None:
        """Values keep their names."""
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        name = node.name
        self.graph.erase_node(node)
        call.name = name


def _copied(x: Tensor, source: Tensor) -> Tensor:
    """What `x` is after source was assigned to all of it."""
    return source.to(x.dtype).expand(x.shape)


class _OfTensor(nn.Module):
    """A weight as torch has it, rounded as the matrix that it is."""

    def __init__(self, site: NetworkSite, rounding: WeightRounding) -> None:
        super().__init__()
        self.site, self.rounding = site, rounding

    def forward(self, weight: Tensor) -> Any:
        return self.site.tensor(self.rounding(self.site.matrix(weight)))
