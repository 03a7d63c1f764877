"""Which axes of a network's inputs may vary."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from pennyweight.models.network.network import Inputs, known_size

# Tokens have a second axis that varies, pictures do not.
_TOKEN_AXES = 2


@dataclass(frozen=True)
class Axes:
    """inputs to trace with, and which of their axes may vary, as torch.export's dynamic_shapes."""

    inputs: Inputs
    shapes: Any


def attempts(net: nn.Module, inputs: Inputs) -> list[Axes]:
    """From all axes that one would like to vary to none.

    torch.export takes an axis of length 1 for one that is always 1, so such a batch is first tried with its rows twice.
    """

    def free(value: Any) -> Any:
        return dict.fromkeys(_free(value), torch.export.Dim.AUTO) or None

    wide = Inputs(*pytree.tree_map(_widened, (inputs.args, dict(inputs.kwargs))))
    ways = [Axes(way, _by_argument(free, net, way)) for way in (wide, inputs)] + [Axes(inputs, None)]
    return ways if _shapes(wide) != _shapes(inputs) else ways[1:]


def varying(exported: torch.export.ExportedProgram, net: nn.Module, inputs: Inputs) -> Any:
    """dynamic_shapes of the axes that do vary in `exported`, for `inputs` that are like those it was traced with."""
    nodes = {node.name: node for node in exported.graph.nodes}
    specs = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    traced = iter(
        [nodes[spec.arg.name].meta.get("val") if isinstance(spec.arg, TensorArgument) else None for spec in specs]
    )

    def of(value: Any) -> Any:
        value_traced = next(traced)
        sizes = value_traced.shape if isinstance(value, Tensor) and isinstance(value_traced, Tensor) else ()
        moving = [axis for axis, size in enumerate(sizes) if known_size(size) is None]
        return dict.fromkeys(moving, torch.export.Dim.AUTO) or None

    return _by_argument(of, net, inputs)


def _free(value: Any) -> range:
    """The axes of an input that one would like to vary."""
    if not isinstance(value, Tensor):
        return range(0)
    is_token = not value.is_floating_point() and value.dim() >= _TOKEN_AXES
    return range(min(value.dim(), _TOKEN_AXES if is_token else 1))


def _widened(value: Any) -> Any:
    """A tensor whose free axes of length 1 have the length 2."""
    for axis in _free(value):
        value = torch.cat((value, value), axis) if value.shape[axis] == 1 else value
    return value


def _by_argument(change: Any, net: nn.Module, inputs: Inputs) -> Any:
    """`change` of every leaf, in the form that torch.export takes: a tuple, or a mapping where there are names."""
    args, kwargs = pytree.tree_map(change, (inputs.args, dict(inputs.kwargs)))
    if not kwargs:
        return args
    return dict(zip(inspect.signature(net.forward).parameters, args, strict=False)) | kwargs


def _shapes(inputs: Inputs) -> list[Any]:
    leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    return [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
