"""Small floats: against torch's own types, and against the specification's formula, code by code."""

from __future__ import annotations

import math

import pytest
import torch

from pennyweight.core.errors import UsageError
from pennyweight.formats import number_format
from pennyweight.formats.minifloat import Minifloat

TORCH = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu,
}


@pytest.mark.parametrize("name", TORCH)
def test_every_code_decodes_as_in_torch(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    ours, theirs = number_format(name).decode(codes), codes.view(TORCH[name]).float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~ours.isnan()])


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_numbers_in_range_are_rounded_as_in_torch(name: str) -> None:
    element = number_format(name)
    # Every float16 in range: all ties of both formats are among them.
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16).float()
    x = x[x.abs() <= element.largest]
    assert torch.equal(element.nearest(x), x.to(TORCH[name]).float())
    assert not (element.decode(element.encode(x)).signbit() & (element.nearest(x) == 0)).any()


def test_four_bits_are_those_of_the_microscaling_specification() -> None:
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = torch.arange(16, dtype=torch.uint8)
    assert number_format("fp4_e2m1").decode(codes).tolist() == values + [-value for value in values]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert number_format("fp4_e2m1").encode(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert number_format("fp4_e2m1").encode(-ties).tolist() == [0, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize(("exponent", "mantissa"), [(2, 3), (3, 2), (1, 2), (4, 2), (5, 1)])
def test_any_split_of_bits_follows_the_formula(exponent: int, mantissa: int) -> None:
    bias = 2 ** (exponent - 1) - 1
    element = Minifloat("other", exponent, mantissa, bias)
    for code in range(2**element.bits):
        sign, rest = divmod(code, 2 ** (exponent + mantissa))
        e, f = divmod(rest, 2**mantissa)
        fraction = f / 2**mantissa
        size = 2.0 ** (1 - bias) * fraction if e == 0 else 2.0 ** (e - bias) * (1 + fraction)
        assert element.decode(torch.tensor([code], dtype=torch.uint8)).item() == math.copysign(size, -sign)


def test_scales_of_powers_of_two_saturate_at_both_ends_and_round_by_value() -> None:
    element = number_format("e8m0")
    assert (element.smallest, element.largest) == (2.0**-127, 2.0**127)
    x = torch.tensor([0.0, -5.0, 2.0**-130, 1.0, 1.49, 1.5, 1.51, 3.0, 3e38])
    # Halfway between 2**0 and 2**1 lies code 128, the even one; halfway between 2**1 and 2**2 too.
    assert element.encode(x).tolist() == [0, 0, 0, 127, 127, 128, 128, 128, 254]


def test_ggml_reads_mxfp4_as_doubled_values_and_halved_scales() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    scales, halved = number_format("e8m0").decode(codes), number_format("e8m0_halved").decode(codes)
    assert torch.equal(halved[:255] * 2, scales[:255])
    assert halved[255] == 2.0**127
    values, doubled = number_format("fp4_e2m1").decode(codes[:16]), number_format("fp4_e2m1_doubled").decode(codes[:16])
    assert torch.equal(doubled, 2 * values)
    assert values[8].signbit()
    assert not doubled[8].signbit()


def test_the_smallest_scale_that_is_emitted_can_be_divided_by() -> None:
    for name, code in [("e8m0", 0), ("e8m0_halved", 1)]:
        element = number_format(name)
        assert element.encode(torch.tensor([0.0, 2.0**-140])).tolist() == [code, code]
        assert element.smallest == 2.0**-127


def test_floats_that_do_not_fit_in_a_byte_are_refused() -> None:
    with pytest.raises(UsageError, match="give 2 to 8 bits"):
        Minifloat("half", 5, 10, 15)
