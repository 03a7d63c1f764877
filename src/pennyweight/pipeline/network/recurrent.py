"""What the matrices of an LSTM or a GRU are multiplied with: its inputs, and its own states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pennyweight.models.network.lift import bound_arguments

aten = torch.ops.aten


def recurrent_rows(node: fx.Node, value_of: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Path of each matrix of the LSTM or GRU `node` whose inputs can be had -> its rows [rows, in].

    `value_of` gives what arguments of the node are. Layers and directions are run one after the other. The matrix of a
    projection is left out.
    """
    given = bound_arguments(node)
    paths = [str(read.target) for read in given["params"]]
    params, x, first = value_of(given["params"]), value_of(given["input"]), value_of(given["hx"])
    is_lstm = node.target == aten.lstm.input
    states = list(first) if is_lstm else [first]
    directions = 2 if given["bidirectional"] else 1
    each = len(params) // (given["num_layers"] * directions)
    sequence = x.transpose(0, 1) if given["batch_first"] else x
    found: dict[str, Tensor] = {}
    for layer in range(given["num_layers"]):
        outputs = []
        for direction in range(directions):
            cell = layer * directions + direction
            own = params[cell * each : (cell + 1) * each]
            start = [state[cell : cell + 1] for state in states]
            turned = sequence.flip(0) if direction else sequence
            out = _run(turned, start, own, has_biases=given["has_biases"], is_lstm=is_lstm)
            input_path, hidden_path = paths[cell * each : cell * each + 2]
            found[input_path] = sequence.flatten(0, -2)
            found[hidden_path] = torch.cat([start[0], out[:-1]]).flatten(0, -2)
            outputs.append(out.flip(0) if direction else out)
        sequence = torch.cat(outputs, dim=-1)
    return found


def _run(x: Tensor, start: list[Tensor], params: list[Tensor], *, has_biases: bool, is_lstm: bool) -> Tensor:
    """The states [steps, batch, width] of one layer in one direction on `x` [steps, batch, in]."""
    first = start if is_lstm else start[0]
    run = aten.lstm.input if is_lstm else aten.gru.input
    out: Tensor = run(x, first, params, has_biases, 1, 0.0, False, False, False)[0]
    return out
