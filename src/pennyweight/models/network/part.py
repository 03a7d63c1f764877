"""Running some operations of a network, with other weights and with values changed on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from pennyweight.models.network.network import Inputs, Network, NetworkSite

# A value's name and what was computed -> what its readers see.
Changed = Callable[[str, Tensor], Tensor]
_TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: functional.conv_transpose1d,
    nn.ConvTranspose2d: functional.conv_transpose2d,
    nn.ConvTranspose3d: functional.conv_transpose3d,
}


def unchanged(name: str, value: Tensor) -> Tensor:
    """Readers see what was computed."""
    return value


class Parts:
    """Runs operations of `network` by name; from several threads at once, for nothing of it is edited."""

    def __init__(self, network: Network) -> None:
        self._graph = network.graph
        self._nodes: dict[str, fx.Node] = {node.name: node for node in network.graph.graph.nodes}
        self._modules: dict[str, NetworkSite] = {}
        self._parameters: dict[str, NetworkSite] = {}
        for site in network.sites:
            for path in (site.parameter, *site.tied):
                owner = path.rpartition(".")[0]
                (self._parameters if site.kind == "recurrent" else self._modules)[
                    path if site.kind == "recurrent" else owner
                ] = site

    def run(
        self,
        nodes: Sequence[str],
        given: Mapping[str, Any],
        *,
        weights: Mapping[str, Tensor],
        changed: Changed = unchanged,
    ) -> dict[str, Any]:
        """The values of `nodes`, in the order of the graph, as their readers see them, and those `given`.

        `weights` by site, shaped as torch has them; sites left out keep the network's own.
        """
        values = dict(given)

        def argument(node: fx.Node) -> Any:
            return self._attribute(node, weights) if node.op == "get_attr" else values[node.name]

        for name in nodes:
            node = self._nodes[name]
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), argument)
            value = self._called(node, args, kwargs, weights)
            values[name] = changed(name, value) if isinstance(value, Tensor) and value.is_floating_point() else value
        return values

    def _attribute(self, node: fx.Node, weights: Mapping[str, Tensor]) -> Any:
        path = str(node.target)
        site = self._parameters.get(path)
        if site is not None and site.name in weights:
            return weights[site.name]
        found: Any = self._graph
        for part in path.split("."):
            found = getattr(found, part)
        return found

    def _called(self, node: fx.Node, args: Any, kwargs: Any, weights: Mapping[str, Tensor]) -> Any:
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        module = self._graph.get_submodule(str(node.target))
        site = self._modules.get(str(node.target))
        if site is None or site.name not in weights:
            return module(*args, **kwargs)
        return with_weight_of(module, args[0], weights[site.name])


def with_weight_of(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """module(x) with `weight` in place of its own, which is not touched: other threads may run it."""
    if isinstance(module, nn.Embedding):
        return functional.embedding(x, weight, module.padding_idx)
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight, module.bias)
    made: Tensor
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        made = module._conv_forward(x, weight, module.bias)
        return made
    transposed: Any = module
    made = _TRANSPOSED[type(module)](
        x, weight, transposed.bias, transposed.stride, transposed.padding, transposed.output_padding,
        transposed.groups, transposed.dilation,
    )  # fmt: skip
    return made


def leaves_of(network: Network, inputs: Inputs) -> list[Any]:
    """What the placeholders of the graph take, in order."""
    given = pytree.tree_leaves((inputs.args, [inputs.kwargs[name] for name in network.example.kwargs]))
    return list(given)


class Recorder(fx.Interpreter):
    """Runs a whole network and keeps the values of some of its nodes."""

    def __init__(self, network: Network, wanted: frozenset[str]) -> None:
        super().__init__(network.graph)
        self._wanted, self._found = wanted, dict[str, Any]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            self._found[n.name] = value
        return value

    @staticmethod
    def values(network: Network, inputs: Inputs, wanted: frozenset[str]) -> dict[str, Any]:
        """The values `wanted`, of a run on `inputs` without gradients."""
        recorder = Recorder(network, wanted)
        with torch.no_grad():
            recorder.run(*leaves_of(network, inputs), enable_io_processing=False)
        return recorder._found
