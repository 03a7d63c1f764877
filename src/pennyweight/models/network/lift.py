"""Calls of ATen operations on parameters become calls of torch's own modules, under the names that they had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
# node and arguments by name -> the module with its tensors, or None to leave the node as it is
_Lifter = Callable[[fx.Node, Mapping[str, Any]], nn.Module | None]


def lift(graph: fx.GraphModule) -> None:
    """Edit `graph`: convolutions, linear maps, embeddings, batch norms and dropouts are modules with the parameters'
    own names again.

    So they follow train() and eval(), state_dict() has the names that the user's module had, and a rewrite puts another
    module in their place. An operation whose weight is computed stays a call; so do LSTM and GRU, whose weights stay
    parameters under their paths.
    """
    taken: dict[str, nn.Module] = {}
    for node in list(graph.graph.nodes):
        lifter = _LIFTERS.get(node.target) if node.op == "call_function" else None
        if lifter is None:
            continue
        arguments = bound_arguments(node)
        made = lifter(node, arguments)
        if made is None:
            continue
        path = _path(node, arguments, made, taken, graph)
        if path not in taken:
            taken[path] = made
            _put(graph, path, made)
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module(path, (arguments[_INPUT.get(node.target, "input")],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        name = node.name
        graph.graph.erase_node(node)
        # Values keep the names that the export gave them.
        call.name = name
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an ATen operation by the names of its schema, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    schema = target._schema.arguments
    values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    values |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return values | dict(node.kwargs)


def _tensor(node: Any) -> Tensor | None:
    """The parameter or buffer that a node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, Tensor) else None


def _weights(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor | None] | None:
    """weight and bias, where both are tensors of the module (the bias may be none at all)."""
    weight, bias = _tensor(arguments["weight"]), _tensor(arguments.get("bias"))
    if weight is None or (bias is None and arguments.get("bias") is not None):
        return None
    return weight, bias


def _filled(module: nn.Module, weights: tuple[Tensor, Tensor | None]) -> nn.Module:
    for name, tensor in zip(("weight", "bias"), weights, strict=True):
        setattr(module, name, None if tensor is None else _parameter(tensor))
    return module


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The same object where it is one: tied weights stay tied."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _linear(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    weights = _weights(arguments)
    if weights is None or weights[0].dim() != 2:
        return None
    outputs, inputs = weights[0].shape
    return _filled(nn.Linear(inputs, outputs, bias=weights[1] is not None, device="meta"), weights)


_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _each(value: Any, axes: int) -> Any:
    """A number for each axis: one may be given for all."""
    if isinstance(value, str):
        return value
    values = list(value) if isinstance(value, list | tuple | torch.Size) else [value]
    return tuple(values * axes if len(values) == 1 else values)


def _convolution(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    weights = _weights(arguments)
    if weights is None:
        return None
    weight, axes, groups = weights[0], weights[0].dim() - 2, int(arguments["groups"])
    module: nn.Module = _CONVOLUTIONS[axes](
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), _each(arguments["stride"], axes),
        _each(arguments["padding"], axes), _each(arguments["dilation"], axes), groups, bias=weights[1] is not None,
        device="meta",
    )  # fmt: skip
    return _filled(module, weights)


def _transposed(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    weights = _weights(arguments)
    if weights is None:
        return None
    weight, axes, groups = weights[0], weights[0].dim() - 2, int(arguments["groups"])
    module: nn.Module = _TRANSPOSED[axes](
        weight.shape[0], weight.shape[1] * groups, tuple(weight.shape[2:]), _each(arguments["stride"], axes),
        _each(arguments["padding"], axes), _each(arguments["output_padding"], axes), groups, weights[1] is not None,
        _each(arguments["dilation"], axes), device="meta",
    )  # fmt: skip
    return _filled(module, weights)


def _embedding(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    weight = _tensor(arguments["weight"])
    if weight is None or weight.dim() != 2:
        return None
    padding = int(arguments["padding_idx"])
    count, width = weight.shape
    module = nn.Embedding(count, width, padding_idx=padding if padding >= 0 else None, device="meta")
    module.weight = _parameter(weight)
    return module


_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _batch_norm(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    mean, variance = _tensor(arguments["running_mean"]), _tensor(arguments["running_var"])
    value = arguments["input"].meta.get("val")
    if mean is None or variance is None or value is None or value.dim() not in _NORMS:
        return None
    scale, shift = _tensor(arguments["weight"]), _tensor(arguments["bias"])
    if (scale is None) != (shift is None):
        return None
    module = _NORMS[value.dim()](
        len(mean), eps=arguments["eps"], momentum=arguments["momentum"], affine=scale is not None
    ).eval()
    if scale is not None:
        _filled(module, (scale, shift))
    module.running_mean, module.running_var = mean, variance
    return module


def _dropout(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    return nn.Dropout(float(arguments["p"])).eval()


_INPUT = {aten.embedding.default: "indices"}
_LIFTERS: dict[Any, _Lifter] = {
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.batch_norm.default: _batch_norm,
    aten.dropout.default: _dropout,
    **{
        overload: _convolution
        for packet in (aten.conv1d, aten.conv2d, aten.conv3d)
        for overload in (packet.default, packet.padding)
    },
    aten.conv_transpose1d.default: _transposed,
    aten.conv_transpose2d.input: _transposed,
    aten.conv_transpose3d.input: _transposed,
}


def _path(
    node: fx.Node, arguments: Mapping[str, Any], made: nn.Module, taken: Mapping[str, nn.Module], graph: fx.GraphModule
) -> str:
    """Where the module goes: where torch's own module was, else where its weight lies, else by the node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inner, kind = stack[-1][:2] if stack else ("", "")
    wanted = arguments.get("weight") or arguments.get("running_mean")
    if not str(kind).startswith("torch.nn.modules.") and isinstance(wanted, fx.Node) and wanted.op == "get_attr":
        path, _, _ = str(wanted.target).rpartition(".")
    else:
        path = inner
    if path in taken and _is_same(taken[path], made):
        return path
    # A parameter of the root, or two operations of one module: the node's name tells them apart.
    if not path or path in taken or _has_more(graph, path, made):
        path = f"{path}.{node.name}" if path else node.name
    while path in taken:
        path += "_"
    return path


def _is_same(one: nn.Module, other: nn.Module) -> bool:
    """Called again: the same module with the same tensors."""
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    same = all(mine.get(name) is tensor for name, tensor in theirs.items())
    return same and bool(mine) and str(one) == str(other)


def _has_more(graph: fx.GraphModule, path: str, made: nn.Module) -> bool:
    """Whether the module at `path` has parameters or modules that `made` has not: then `made` is only a part of it."""
    try:
        there = graph.get_submodule(path)
    except AttributeError:
        return False
    names = {name for name, _ in [*there.named_parameters(), *there.named_buffers()]} - {"num_batches_tracked"}
    return not names <= {name for name, _ in [*made.named_parameters(), *made.named_buffers()]}


def _put(graph: fx.GraphModule, path: str, module: nn.Module) -> None:
    parent: nn.Module = graph
    *above, last = path.split(".")
    for part in above:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        child = parent._modules[part]
        assert child is not None
        parent = child
    parent._modules[last] = module
