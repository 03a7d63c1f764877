from __future__ import annotations

import pytest
import torch

from pennyweight.core.registry import provided
from pennyweight.formats import NumberFormat, number_format
from pennyweight.schemes import QuantizedWeight, parse_scheme
from pennyweight.solvers.learned.neighbours import Ladder

ELEMENTS = [element for element in provided("formats").values() if element.smallest <= 0]


def weight_of_codes(name: str, codes: list[int], scale: float = 1.0) -> QuantizedWeight:
    scheme = parse_scheme(f"{name}-tensor-f32")
    return QuantizedWeight(torch.tensor([codes], dtype=torch.uint8), torch.tensor([[scale]]), None, scheme)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: str(element.name))
def test_a_rung_is_the_next_value_that_an_encoder_gives(element: NumberFormat) -> None:
    table = element.decode(torch.arange(2**element.bits, dtype=torch.uint8))
    values = sorted({float(element.nearest(value)) for value in table if value.isfinite()})
    codes = element.encode(torch.tensor(values))
    weight = weight_of_codes(element.name, codes.tolist())
    ladder = Ladder.of(element, torch.device("cpu"))
    below, above = ladder.beside(weight)
    assert below[0].tolist() == [values[0], *values[:-1]]
    assert above[0].tolist() == [*values[1:], values[-1]]


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda element: str(element.name))
def test_no_step_keeps_every_code_also_those_that_no_encoder_gives(element: NumberFormat) -> None:
    weight = weight_of_codes(element.name, list(range(2**element.bits)))
    stayed = Ladder.of(element, torch.device("cpu")).moved(weight, torch.zeros(weight.shape, dtype=torch.int8))
    assert torch.equal(stayed.codes, weight.codes)


def test_both_zeros_of_a_float_stand_on_one_rung() -> None:
    ladder = Ladder.of(number_format("fp4_e2m1"), torch.device("cpu"))
    plus, minus = weight_of_codes("fp4_e2m1", [0]), weight_of_codes("fp4_e2m1", [8])
    for weight in (plus, minus):
        below, above = ladder.beside(weight)
        assert (below.item(), above.item()) == (-0.5, 0.5)


def test_steps_end_at_the_end_of_the_ladder() -> None:
    ladder = Ladder.of(number_format("int3"), torch.device("cpu"))
    moved = ladder.moved(weight_of_codes("int3", [0, 7, 6]), torch.tensor([[-3, 1, 4]], dtype=torch.int8))
    assert moved.codes.tolist() == [[0, 7, 7]]
