"""The rows that the matrices of an LSTM or a GRU read: with them the cells can be computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pennyweight.models.network import capture
from pennyweight.models.network.network import Inputs
from pennyweight.pipeline.network.recurrent import recurrent_rows
from pennyweight.pipeline.network.walk import Walk

# A few steps of a recurrence in float32.
CLOSE = 1e-5
STEPS, SAMPLES = 4, 3


def rows_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Rows by path, parameters by path, and the states that the module gives [samples, steps, width]."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = module

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.cell(x)[0]
            return out

    x = torch.randn(SAMPLES, STEPS, 3, generator=torch.Generator().manual_seed(0))
    network = capture(Wrapped(), x)
    walk = Walk(network, [Inputs((x,))])
    for name, node in walk.nodes.items():
        if node.target in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
            rows = recurrent_rows(node, lambda argument: walk.value(argument, 0))
            return rows, dict(network.graph.named_parameters()), walk.advance(name)[0][0].detach()
        walk.advance(name)
    raise AssertionError


def lstm_states(rows: dict[str, Tensor], parameters: dict[str, Tensor], suffix: str) -> Tensor:
    """[steps, samples, width], of the cell whose parameters end in `suffix`, from its rows alone."""
    gates = sum(
        rows[f"cell.weight_{kind}_{suffix}"] @ parameters[f"cell.weight_{kind}_{suffix}"].T
        + parameters[f"cell.bias_{kind}_{suffix}"]
        for kind in ("ih", "hh")
    )
    assert isinstance(gates, Tensor)
    inside, forget, new, out = gates.view(STEPS, SAMPLES, 4, -1).unbind(2)
    cell, states = torch.zeros_like(new[0]), []
    for step in range(STEPS):
        cell = forget[step].sigmoid() * cell + inside[step].sigmoid() * new[step].tanh()
        states.append(out[step].sigmoid() * cell.tanh())
    return torch.stack(states)


@pytest.mark.parametrize("layers", [1, 2])
def test_rows_of_an_lstm_give_its_states(layers: int) -> None:
    torch.manual_seed(1)
    rows, parameters, out = rows_of(nn.LSTM(3, 5, num_layers=layers, batch_first=True))
    with torch.no_grad():
        states = lstm_states(rows, parameters, f"l{layers - 1}")
    assert (states.transpose(0, 1) - out).abs().max() < CLOSE


def test_rows_of_a_reversed_direction_are_in_its_own_order() -> None:
    torch.manual_seed(1)
    rows, parameters, out = rows_of(nn.LSTM(3, 5, bidirectional=True, batch_first=True))
    assert set(rows) == {name for name in parameters if "weight" in name}
    turned = dict(rows)
    # What it reads of the inputs has no order; turned round here so that states and inputs meet.
    turned["cell.weight_ih_l0_reverse"] = (
        rows["cell.weight_ih_l0_reverse"].view(STEPS, SAMPLES, 3).flip(0).flatten(0, 1)
    )
    with torch.no_grad():
        states = lstm_states(turned, parameters, "l0_reverse")
    assert (states.flip(0).transpose(0, 1) - out[..., 5:]).abs().max() < CLOSE


def test_rows_of_a_gru_give_its_states() -> None:
    torch.manual_seed(1)
    rows, parameters, out = rows_of(nn.GRU(3, 5, batch_first=True))
    with torch.no_grad():
        of_input = rows["cell.weight_ih_l0"] @ parameters["cell.weight_ih_l0"].T + parameters["cell.bias_ih_l0"]
        hidden = rows["cell.weight_hh_l0"]
        of_state = hidden @ parameters["cell.weight_hh_l0"].T + parameters["cell.bias_hh_l0"]
        reset, update, new = of_input.chunk(3, 1)
        r, z, n = of_state.chunk(3, 1)
        update = (update + z).sigmoid()
        states = (1 - update) * (new + (reset + r).sigmoid() * n).tanh() + update * hidden
    assert (states.view(STEPS, SAMPLES, -1).transpose(0, 1) - out).abs().max() < CLOSE


def test_the_matrix_of_a_projection_is_left_out() -> None:
    torch.manual_seed(1)
    rows, parameters, _ = rows_of(nn.LSTM(3, 5, proj_size=2, batch_first=True))
    assert set(rows) == {"cell.weight_ih_l0", "cell.weight_hh_l0"}
    assert "cell.weight_hr_l0" in parameters
    assert rows["cell.weight_hh_l0"].shape == (STEPS * SAMPLES, 2)
