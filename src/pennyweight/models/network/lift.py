"""Calls of ATen operations on parameters become calls of torch's own modules, under the names that they had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network.places import Places
from pennyweight.models.network.recurrent import follow_mode

aten = torch.ops.aten
# node and arguments by name -> the module with its tensors, or None to leave the node as it is
_Lifter = Callable[[fx.Node, Mapping[str, Any]], nn.Module | None]


def lift(graph: fx.GraphModule, net: nn.Module) -> None:
    """Edit `graph`, the graph of `net`: convolutions, linear maps, embeddings, batch norms and dropouts are modules
    under the paths that they had in `net`.

    So they follow train() and eval(), state_dict() has the names of `net`, and a rewrite puts another module in their
    place. An operation whose weight is computed stays a call; so do LSTM and GRU, whose weights stay parameters under
    their paths. A parameter without a module of its own, such as in_proj_weight of an attention, is found in
    state_dict() under a second name too, that of the module made for it.
    """
    places = Places(graph, net)
    for node in list(graph.graph.nodes):
        lifter = _LIFTERS.get(node.target) if node.op == "call_function" else None
        if lifter is None:
            continue
        arguments = bound_arguments(node)
        made = lifter(node, arguments)
        if made is not None:
            path = places.put(made, node, _first_read(arguments))
            _replace(graph.graph, node, path, arguments)
    follow_mode(graph)
    _forget_constants(graph, net)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def _forget_constants(graph: fx.GraphModule, net: nn.Module) -> None:
    """Tensors that `net` does not save are not saved."""
    saved = {*net.state_dict(keep_vars=True), *(name for name, _ in graph.named_parameters())}
    for path, module in graph.named_modules():
        for name in module._buffers:
            is_saved = (f"{path}.{name}" if path else name) in saved
            is_second = name in ("running_mean", "running_var", "num_batches_tracked")
            if not is_saved and not is_second:
                module._non_persistent_buffers_set.add(name)


def _replace(graph: fx.Graph, node: fx.Node, path: str, arguments: Mapping[str, Any]) -> None:
    """Put a call of the module at `path` into the place of `node`, under its name."""
    source = arguments[_INPUT.get(node.target, "input")]
    with graph.inserting_before(node):
        call = graph.call_module(path, (source,))
    call.meta = dict(node.meta)
    if node.target in _LISTS:
        for item in list(node.users):
            item.replace_all_uses_with(call)
            graph.erase_node(item)
        call.meta["val"] = call.meta["val"][0]
    else:
        node.replace_all_uses_with(call)
    name = node.name
    graph.erase_node(node)
    # Values keep the names that the export gave them.
    call.name = name


def _first_read(arguments: Mapping[str, Any]) -> fx.Node | None:
    """The first of the parameters and buffers among the arguments."""
    wanted = (arguments.get("weight"), arguments.get("running_mean"))
    return next((node for node in wanted if isinstance(node, fx.Node) and node.op == "get_attr"), None)


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
    module = nn.Embedding(
        count, width, padding if padding >= 0 else None, scale_grad_by_freq=arguments["scale_grad_by_freq"],
        sparse=arguments["sparse"], device="meta",
    )  # fmt: skip
    module.weight = _parameter(weight)
    return module


_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _batch_norm(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    """Also those without running statistics; not those that take batch statistics although they have others."""
    value = arguments["input"].meta.get("val")
    norm = _NORMS.get(value.dim()) if isinstance(value, Tensor) else None
    weight, bias = _tensor(arguments["weight"]), _tensor(arguments["bias"])
    mean, variance = _tensor(arguments["running_mean"]), _tensor(arguments["running_var"])
    read = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": variance}
    has_unread = any(tensor is None and arguments[name] is not None for name, tensor in read.items())
    is_half = (weight is None) != (bias is None) or (mean is None) != (variance is None)
    if norm is None or has_unread or is_half or arguments.get("training", False) == (mean is not None):
        return None
    module: nn.Module = norm(
        value.shape[1], eps=arguments["eps"], momentum=arguments["momentum"], affine=weight is not None,
        track_running_stats=mean is not None,
    )  # fmt: skip
    if weight is not None:
        _filled(module, (weight, bias))
    if mean is not None:
        # Buffers: assigned past the types that torch declares for modules.
        module._buffers |= {"running_mean": mean, "running_var": variance}
    return module


def _dropout(node: fx.Node, arguments: Mapping[str, Any]) -> nn.Module | None:
    """Not one that is asked to be active in eval mode too."""
    kind = _DROPOUTS[node.target]
    if kind is None:
        value = arguments["input"].meta.get("val")
        kind = _DROPOUTS_OF_CHANNELS.get(value.dim()) if isinstance(value, Tensor) else None
    return None if kind is None or arguments["train"] else kind(float(arguments["p"]))


_DROPOUTS: dict[Any, Any] = {
    aten.dropout.default: nn.Dropout,
    aten.feature_dropout.default: None,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
}
_DROPOUTS_OF_CHANNELS: dict[int, Any] = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}
# These give a list, whose first element is what the module gives.
_LISTS = (aten._native_batch_norm_legit_no_training.default,)


_INPUT: dict[Any, str] = {aten.embedding.default: "indices"}
_LIFTERS: dict[Any, _Lifter] = {
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    **dict.fromkeys(_DROPOUTS, _dropout),
    **{
        overload: _convolution
        for packet in (aten.conv1d, aten.conv2d, aten.conv3d)
        for overload in (packet.default, packet.padding)
    },
    aten.conv_transpose1d.default: _transposed,
    aten.conv_transpose2d.input: _transposed,
    aten.conv_transpose3d.input: _transposed,
}
