"""A network's graph with markers that torch.onnx.export writes down as they are: where values are rounded, and which
weights are codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.containers.onnx.calls import Call, Written
from pennyweight.containers.onnx.edges import begin_of
from pennyweight.containers.onnx.operations import (
    clamp_of,
    integer_operands,
    is_global_average,
    moved,
)
from pennyweight.models.network.identity import name_of
from pennyweight.models.network.lift import bound_arguments
from pennyweight.models.network.network import Network
from pennyweight.models.network.quantized import QuantizedNetwork
from pennyweight.schemes.activation import ActivationParameters

DOMAIN = "pennyweight"


def _marker(kind: str, inputs: tuple[Tensor, ...], shape: Any, **attributes: str | int) -> Tensor:
    floats = next(x.dtype for x in inputs if x.is_floating_point())
    made: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", inputs, {**attributes}, dtype=floats, shape=shape)
    return made


def edge(x: Tensor, value: str) -> Tensor:
    """`x`, rounded as the edge `value` is."""
    return _marker("Edge", (x,), x.shape, value=value)


def weight(w: Tensor, site: str) -> Tensor:
    """The weight of `site`, decoded."""
    return _marker("Weight", (w,), w.shape, site=site)


def bias(b: Tensor, site: str, node: str) -> Tensor:
    """The bias of a product of integers with the weight of `site`."""
    return _marker("Bias", (b,), b.shape, site=site, node=node)


def linear(x: Tensor, w: Tensor, b: Tensor | None, site: str, node: str) -> Tensor:
    """x w' + b."""
    inputs = (x, w) if b is None else (x, w, b)
    return _marker("Linear", inputs, (*x.shape[:-1], w.shape[0]), site=site, node=node, rank=x.dim())


def embedding(indices: Tensor, w: Tensor, site: str) -> Tensor:
    """Rows of `w`."""
    return _marker("Embedding", (indices, w), (*indices.shape, w.shape[1]), site=site)


def global_average(x: Tensor) -> Tensor:
    """The mean over all axes behind the channels, as an operation that has a product of integers: axes of length 1."""
    shape = (*x.shape[:2], *([1] * (x.dim() - 2)))
    made: Tensor = torch.onnx.ops.symbolic("GlobalAveragePool", (x,), {}, dtype=x.dtype, shape=shape)
    return made


def marked(quantized: QuantizedNetwork, written: Mapping[str, Written]) -> Network:
    """A copy of the float network in which every quantized weight and every static edge is marked."""
    network = quantized.network.copied()
    graph = network.graph
    nodes = {node.name: node for node in graph.graph.nodes}
    averages = [node for name, node in nodes.items() if name in quantized.plan.edges and is_global_average(node)]
    for value, scheme in quantized.plan.edges.items():
        if not scheme.is_dynamic:
            _mark_edge(nodes[value], quantized.activations[value])
    for site in written.values():
        for call in site.calls:
            _mark_call(graph, nodes[call.node], call, site)
    for node in averages:
        _mark_average(node)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return network


def _mark_edge(node: fx.Node, parameters: ActivationParameters) -> None:
    """Round `node`; clamps before it that change no code go, and what they read is rounded before those that do."""
    value, begin = node.name, begin_of(node)
    clamps = list(_clamps_between(begin, node))
    if all(_is_absorbed(clamp, parameters) for clamp in clamps):
        _insert_edge(begin, value)
        if begin is not node:
            node.replace_all_uses_with(next(iter(begin.users)))
        return
    if begin is not node and (integer_operands(begin) or begin.op == "call_module"):
        _insert_edge(begin, value)
    _insert_edge(node, value)


def _insert_edge(node: fx.Node, value: str) -> None:
    last = node
    while last.op == "placeholder" and last.next.op == "placeholder":
        last = last.next
    with node.graph.inserting_after(last):
        call = node.graph.call_function(edge, (node, value))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def _clamps_between(begin: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    while end is not begin:
        source = clamp_of(end)
        if source is not None:
            yield end
        source = source or moved(end)
        assert source is not None
        end = source


def _is_absorbed(clamp: fx.Node, parameters: ActivationParameters) -> bool:
    """Whether rounding gives the same codes without the clamp: its ends have the first and the last code."""
    ends = torch.tensor(_bounds(clamp), dtype=torch.float32)
    low, high = parameters.values(ends).tolist()
    return bool(low == parameters.element.smallest and high == parameters.element.largest)


def _bounds(clamp: fx.Node) -> tuple[float, float]:
    match name_of(clamp):
        case "relu":
            return 0.0, inf
        case "relu6":
            return 0.0, 6.0
        case "hardtanh":
            low, high = (bound_arguments(clamp)[name] for name in ("min_val", "max_val"))
        case _:
            low, high = (bound_arguments(clamp).get(name) for name in ("min", "max"))
    return -inf if low is None else float(low), inf if high is None else float(high)


def _mark_call(graph: fx.GraphModule, node: fx.Node, call: Call, written: Written) -> None:
    site = call.site
    if call.kind == "recurrent":
        read = next(source for source in node.all_input_nodes if source.target == site.parameter)
        with graph.graph.inserting_after(read):
            mark = graph.graph.call_function(weight, (read, site.name))
        node.replace_input_with(read, mark)
        return
    module = graph.get_submodule(call.target)
    with graph.graph.inserting_before(node):
        w = graph.graph.get_attr(f"{call.target}.weight")
        has_bias = getattr(module, "bias", None) is not None
        b = graph.graph.get_attr(f"{call.target}.bias") if has_bias else None
        x = node.args[0]
        if call.kind == "linear":
            made = graph.graph.call_function(linear, (x, w, b, site.name, node.name))
        elif call.kind == "embedding":
            made = graph.graph.call_function(embedding, (x, w, site.name))
        else:
            w = graph.graph.call_function(weight, (w, site.name))
            if b is not None and written.form == "integers":
                b = graph.graph.call_function(bias, (b, site.name, node.name))
            made = graph.graph.call_function(*_convolution(module, (x, w, b)))
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)


def _convolution(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The function that `module` computes, and its arguments."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        plain = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(module.kernel_size)]
        return plain, (*given, module.stride, module.padding, module.dilation, module.groups)
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    transposed = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}
    rest = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
    return transposed[len(module.kernel_size)], (*given, *rest)


def _mark_average(node: fx.Node) -> None:
    x = node.args[0]
    value = node.meta.get("val")
    with node.graph.inserting_before(node):
        made = node.graph.call_function(global_average, (x,))
        if value is not None and value.dim() == 2:
            made = node.graph.call_function(torch.flatten, (made, 1))
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
