"""Integers: their ranges, names and codes, said in numbers."""

from __future__ import annotations

import pytest
import torch

from pennyweight.core.errors import UsageError
from pennyweight.formats import number_format
from pennyweight.formats.integer import PROVIDES, Int


def test_two_to_eight_bits_signed_and_unsigned_are_provided() -> None:
    assert {element.name for element in PROVIDES} == {f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)}


@pytest.mark.parametrize(
    ("name", "low", "high"), [("int2", -2, 1), ("int4", -8, 7), ("int8", -128, 127), ("uint3", 0, 7), ("uint8", 0, 255)]
)
def test_the_range_is_that_of_twos_complement(name: str, low: int, high: int) -> None:
    element = number_format(name)
    assert (element.smallest, element.largest) == (low, high)
    codes = torch.arange(2**element.bits, dtype=torch.uint8)
    assert element.decode(codes).tolist() == list(range(low, high + 1))


def test_ties_go_to_the_even_value_on_both_sides_of_zero() -> None:
    x = torch.tensor([-3.5, -2.5, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5])
    assert Int(4).decode(Int(4).encode(x)).tolist() == [-4, -2, -2, 0, 0, 0, 2, 2]


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match="give 2 to 8"):
        Int(bits)


def test_an_unknown_format_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'int9'.*int2, int3.*uint8"):
        number_format("int9")
