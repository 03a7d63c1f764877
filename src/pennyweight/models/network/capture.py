"""Any torch module as a Network: torch.export writes its graph down, `lift` puts torch's own modules back into it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pennyweight.core.errors import ModelError, WeightError, first_line
from pennyweight.models.network.axes import Axes, attempts, varying
from pennyweight.models.network.functional import put_dropouts_back, without_mutation, writes_into_parts
from pennyweight.models.network.lift import lift
from pennyweight.models.network.network import Inputs, Network
from pennyweight.models.network.quiet import in_eval, quiet, where
from pennyweight.models.network.sites import find_refused, find_sites

# By so many roundings of the largest of them numbers that the graph gives may differ from the network's.
_ROUNDINGS = 8
_REMEDY = (
    "What depends on the values of tensors (if, while, .item(), .tolist(), numpy) has no place in a fixed graph: "
    "compute it with torch.where or torch.cond, outside of the network, or quantize the parts between."
)


def capture(net: nn.Module, example: Any, *, dynamic: Any = None) -> Network:
    """The graph of `net`, in eval mode, as it runs on `example` (a tensor, a tuple of them, or a mapping by argument).

    The first axis of every input may vary afterwards, and the second of integer inputs (tokens), where the network
    allows it; `dynamic` says it otherwise, as torch.export's dynamic_shapes. The network has tensors of its own: `net`
    is not changed. What exists in train mode alone, such as dropout inside attention, is not part of it.

    Raises DataError for an example that is none, WeightError for weights that are not finite, and ModelError, with the
    line of the network's code, where the graph cannot be written down or does not give what `net` gives.
    """
    # torch.compile wraps the module that it was given.
    net = getattr(net, "_orig_mod", net)
    inputs = Inputs.of(example)
    _check_weights(net)
    with in_eval(net), quiet():
        exported = _exported(net, inputs, dynamic)
        graph = _functional(exported, net)
        lift(graph, net)
        graph.eval()
        _check_result(net, graph, inputs)
    axes = varying(exported, net, inputs) if dynamic is None else dynamic
    return Network(graph, find_sites(graph), inputs, axes, find_refused(graph))


def _exported(net: nn.Module, inputs: Inputs, dynamic: Any) -> torch.export.ExportedProgram:
    """The first of the ways to let axes vary that the network allows."""
    ways = [Axes(inputs, dynamic)] if dynamic is not None else attempts(net, inputs)
    for way in ways:
        given = way.inputs
        try:
            return torch.export.export(net, given.args, dict(given.kwargs), dynamic_shapes=way.shapes)
        except Exception as error:
            if way is ways[-1]:
                raise ModelError(
                    f"{type(net).__name__} cannot be captured: {first_line(error)}{where(error)}\n{_REMEDY}"
                ) from error
    raise AssertionError("there is always a way to try")


def _functional(exported: torch.export.ExportedProgram, net: nn.Module) -> fx.GraphModule:
    """The graph without operations that write into their arguments."""
    graph = copy.deepcopy(exported.module(check_guards=False))
    assert isinstance(graph, fx.GraphModule)
    if writes_into_parts(graph):
        # torch's own rewriting knows all views, but makes more of the graph's operations than needs be.
        graph = copy.deepcopy(exported.run_decompositions({}).module(check_guards=False))
        assert isinstance(graph, fx.GraphModule)
        put_dropouts_back(graph, net)
    without_mutation(graph)
    return graph


def _check_weights(net: nn.Module) -> None:
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(f"{name} is on the device meta: load the network's weights before it is captured")
        # Masks are buffers with infinities.
        is_finite = tensor.isfinite() if isinstance(tensor, nn.Parameter) else ~tensor.isnan()
        if not bool(is_finite.all()):
            raise WeightError(f"{name} has NaN or infinity: train again or load another checkpoint")


def _check_result(net: nn.Module, graph: fx.GraphModule, inputs: Inputs) -> None:
    """On the example, graph and network give the same: bit for bit, but for sums in another order."""
    buffers = {buffer: buffer.clone() for buffer in net.buffers()}
    results = []
    for module in (net, graph):
        given = copy.deepcopy(inputs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                results.append(pytree.tree_leaves(module(*given.args, **given.kwargs)))
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                raise ModelError(
                    f"{type(net).__name__} does not run on the first batch ({first_line(error)}): give inputs that it "
                    "takes; token ids lie in its vocabulary, and are no more than its positions"
                ) from error
    for buffer, saved in buffers.items():
        buffer.copy_(saved)
    if len(results[0]) != len(results[1]) or not all(map(_is_equal, *results)):
        raise ModelError(
            f"{type(net).__name__} gives something else than its graph does: it depends on something outside, or keeps "
            "state between calls. Let both be inputs and outputs."
        )


def _is_equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    same = (one == other) | (one.isnan() & other.isnan())
    if bool(same.all()) or one.dtype not in (torch.float32, torch.float64):
        return bool(same.all())
    # A view of a single row has other strides in a graph, and a matrix product another order then.
    ours, theirs = one[~same], other[~same]
    allowed = _ROUNDINGS * torch.finfo(one.dtype).eps * ours.abs().amax()
    return bool(allowed.isfinite()) and bool(((ours - theirs).abs() <= allowed).all())
