"""Any torch module as a Network: torch.export writes its graph down, `lift` puts torch's own modules back into it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.core.errors import ModelError
from pennyweight.models.network.functional import without_mutation
from pennyweight.models.network.lift import lift
from pennyweight.models.network.network import Inputs, Network
from pennyweight.models.network.sites import find_sites

_REMEDY = (
    "What depends on the values of tensors (if, while, .item(), .tolist()) has no place in a fixed graph: compute it "
    "with torch.where or torch.cond, or quantize the parts between."
)
# Tokens have a second axis that varies, pictures do not.
_TOKEN_AXES = 2


def capture(net: nn.Module, example: Any, *, dynamic: Any = None) -> Network:
    """The graph of `net`, in eval mode, as it runs on `example` (a tensor, a tuple of them, or a mapping by argument).

    The first axis of every input may vary afterwards, and the second of integer inputs (tokens); `dynamic` says it
    otherwise, as torch.export's dynamic_shapes. The network has tensors of its own: `net` is not changed. Raises
    ModelError where the graph cannot be written down.
    """
    if isinstance(net, fx.GraphModule) and any(node.op == "call_module" for node in net.graph.nodes):
        net = copy.deepcopy(net)
    inputs = Inputs.of(example)
    shapes = _axes(inputs) if dynamic is None else dynamic
    with _in_eval(net), warnings.catch_warnings():
        # Of torch about tensors that modules (LSTM) keep in lists.
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(net, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes)
        except Exception as error:
            raise ModelError(f"{type(net).__name__} cannot be captured: {_first_lines(error)}\n{_REMEDY}") from error
        graph = copy.deepcopy(exported.module(check_guards=False))
    assert isinstance(graph, fx.GraphModule)
    without_mutation(graph)
    lift(graph)
    graph.eval()
    return Network(graph, find_sites(graph), inputs, shapes)


def _axes(inputs: Inputs) -> Any:
    """dynamic_shapes for torch.export: axes that may vary if the network allows it."""

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        is_token = not value.is_floating_point() and value.dim() >= _TOKEN_AXES
        return dict.fromkeys(range(min(value.dim(), _TOKEN_AXES if is_token else 1)), torch.export.Dim.AUTO)

    by_name: Mapping[str, Any] = {name: of(value) for name, value in inputs.kwargs.items()}
    return tuple(of(value) for value in inputs.args) or by_name


@contextmanager
def _in_eval(net: nn.Module) -> Iterator[None]:
    """`net` in eval mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _first_lines(error: Exception) -> str:
    """What went wrong and where in the user's code, without torch's own advice."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    code = [line.strip() for line in lines if line.lstrip().startswith("File ") and "/torch/" not in line]
    return "; ".join([lines[0] if lines else type(error).__name__, *code[-1:]])
