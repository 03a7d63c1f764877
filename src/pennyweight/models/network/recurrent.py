"""Calls of LSTM, GRU and plain recurrent operations as calls of torch's modules."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
# operation -> the module, and the blocks of rows in its weights, one a gate
_KINDS: dict[Any, tuple[Any, int]] = {
    aten.lstm.input: (nn.LSTM, 4),
    aten.gru.input: (nn.GRU, 3),
    aten.rnn_tanh.input: (nn.RNN, 1),
    aten.rnn_relu.input: (nn.RNN, 1),
}
RECURRENT = tuple(_KINDS)


def recurrent_module(target: Any, arguments: Mapping[str, Any], tensors: Sequence[Tensor]) -> nn.RNNBase | None:
    """The module that does what `target` does with `tensors`, in the order in which torch has them; None where they
    are not laid out so."""
    kind, gates = _KINDS[target]
    first, second = tensors[0], tensors[1]
    hidden = first.shape[0] // gates
    options: dict[str, Any] = {"nonlinearity": "relu"} if target is aten.rnn_relu.input else {}
    options |= {"proj_size": second.shape[1]} if second.shape[1] != hidden else {}
    module: nn.RNNBase = kind(
        first.shape[1], hidden, num_layers=arguments["num_layers"], bias=arguments["has_biases"],
        batch_first=arguments["batch_first"], dropout=arguments["dropout"], bidirectional=arguments["bidirectional"],
        device="meta", **options,
    )  # fmt: skip
    if [weight.shape for weight in module._flat_weights if weight is not None] != [tensor.shape for tensor in tensors]:
        return None
    for name, tensor in zip(module._flat_weights_names, tensors, strict=True):
        is_own = isinstance(tensor, nn.Parameter)
        setattr(module, name, tensor if is_own else nn.Parameter(tensor, requires_grad=False))
    return module


def state_of(arguments: Mapping[str, Any]) -> Any:
    """The initial state as the module takes it: two tensors of an LSTM, one of the others."""
    state = arguments["hx"]
    return tuple(state) if isinstance(state, list | tuple) else state


def regroup_outputs(graph: fx.Graph, node: fx.Node, call: fx.Node) -> None:
    """Let those who read the operation's outputs (output, h, c) read the module's: (output, (h, c)), or (output, h)."""
    is_lstm = node.target is aten.lstm.input
    with graph.inserting_after(call):
        state = graph.call_function(operator.getitem, (call, 1)) if is_lstm else call
    values = call.meta.get("val")
    if is_lstm and values is not None:
        state.meta["val"] = tuple(values[1:])
        call.meta["val"] = (values[0], tuple(values[1:]))
    for item in list(node.users):
        place = int(item.args[1])  # type: ignore[arg-type]
        item.args = (state, place - 1) if is_lstm and place > 0 else (call, place)
    if is_lstm and not state.users:
        graph.erase_node(state)
