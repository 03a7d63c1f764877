"""The float32 steps against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pennyweight.evaluate.onnx.integer.rounding import (
    dequantize,
    fused_multiply_add,
    integer_limits,
    quantize,
    requantize,
    to_int32,
)

FINITE = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
UINT8, INT8 = np.dtype(np.uint8), np.dtype(np.int8)


def rounded(exact: Fraction) -> np.float32:
    """The float32 nearest to `exact`, ties to even: of three candidates around the float64 approximation."""
    middle = np.float32(float(exact))
    around = [np.nextafter(middle, np.float32(-np.inf)), middle, np.nextafter(middle, np.float32(np.inf))]
    return min(around, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.int32)) & 1))


@settings(deadline=None, max_examples=300)
@given(FINITE, FINITE, FINITE)
@example(1.0000001192092896, 1.0000001192092896, -1.0)
def test_a_fused_multiply_add_rounds_the_exact_value_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert fused_multiply_add(np.float32(a), np.float32(b), np.float32(c)) == rounded(exact)


def test_a_sum_just_above_a_tie_is_not_taken_for_the_tie() -> None:
    """(1 + 2^-12)^2 lies half way between two floats; 2^-60 more is lost in a float64 sum."""
    a, c = np.float32(1 + 2**-12), np.float32(2.0**-60)
    assert np.float32(float(a) * float(a) + float(c)) == np.float32(1 + 2**-11)
    assert fused_multiply_add(a, a, c) == np.float32(1 + 2**-11 + 2**-23)
    assert fused_multiply_add(-a, a, -c) == -np.float32(1 + 2**-11 + 2**-23)
    assert fused_multiply_add(a, a, -c) == np.float32(1 + 2**-11)


def test_ties_go_to_the_even_difference_from_the_zero_point() -> None:
    x = np.array([-1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    assert quantize(x, np.float32(1), 3, dtype=UINT8).tolist() == [1, 3, 3, 5, 5]
    assert requantize(np.array([-3, -1, 1, 3, 5], np.int32), np.float32(0.5), 3, dtype=UINT8).tolist() == [
        1,
        3,
        3,
        5,
        5,
    ]


def test_what_is_no_number_becomes_the_lowest_code_and_infinities_saturate() -> None:
    x = np.array([np.nan, -np.inf, np.inf, -3e38, 3e38], np.float32)
    assert quantize(x, np.float32(1e-3), 7, dtype=UINT8).tolist() == [0, 0, 255, 0, 255]
    assert quantize(x, np.float32(1e-3), 7, dtype=INT8).tolist() == [-128, -128, 127, -128, 127]


def test_a_sum_beyond_24_bits_is_rounded_before_it_is_scaled() -> None:
    sums = np.array([2**24 + 1, 2**24 + 3], np.int32)
    assert requantize(sums, np.float32(2**-24 * 100), 0, dtype=UINT8).tolist() == [100, 100]
    assert (sums.astype(np.float32).astype(np.int64) - 2**24).tolist() == [0, 4]


def test_what_int32_does_not_hold_becomes_its_lowest_value() -> None:
    x = np.array([2.5, -3.5, 2.0**31, -(2.0**31), np.nan, np.inf, 2.0**31 - 128], np.float32)
    low = -(2**31)
    assert to_int32(x).tolist() == [2, -4, low, low, low, low, 2**31 - 128]


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-30, 1e30), st.integers(0, 255))
def test_every_code_survives_decoding_and_encoding(scale: float, zero: int) -> None:
    codes = np.arange(*integer_limits(UINT8), dtype=np.uint8)
    assert (quantize(dequantize(codes, np.float32(scale), zero), np.float32(scale), zero, dtype=UINT8) == codes).all()
