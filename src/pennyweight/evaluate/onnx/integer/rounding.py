"""The float32 steps between integers, as ONNX Runtime's kernels take them on x86-64.

Everywhere float32, one rounding after each operation, nearest, ties to even; a fused multiply-add rounds once.
Source: the behaviour of MLAS (MlasQuantizeLinear, MlasRequantizeOutput), confirmed against ONNX Runtime 1.32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pennyweight.evaluate.onnx.integer.base import Array

Floats = NDArray[np.float32]
# A scale or a zero point: one for all, or an array that is broadcast.
Number = Array | np.float32
Zero = Array | np.int32 | int
Sums = NDArray[np.int32]


def quantize(x: Array, scale: Number, zero: Zero, *, dtype: np.dtype[Any]) -> Array:
    """code = round(clamp(x / scale, lowest - zero, highest - zero)) + zero; NaN becomes the lowest code.

    `scale` and `zero` are broadcast against `x`. Clamping to integers before rounding equals clamping after it.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return _to_codes(x.astype(np.float32) / scale, zero, dtype=dtype)


def dequantize(codes: Array, scale: Number, zero: Zero) -> Floats:
    """x = float32(code - zero) * scale, the difference in int32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((codes.astype(np.int32) - np.asarray(zero, np.int32)).astype(np.float32) * scale, np.float32)


def requantize(sums: Sums, multiplier: Number, zero: int, *, dtype: np.dtype[Any]) -> Array:
    """code = round(clamp(float32(sum) * multiplier, lowest - zero, highest - zero)) + zero.

    The int32 sum is rounded to float32 first: beyond 2^24 it loses its last bits, and ties may appear or vanish there.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return _to_codes(sums.astype(np.float32) * multiplier, zero, dtype=dtype)


def _to_codes(x: Array, zero: Zero, *, dtype: np.dtype[Any]) -> Array:
    low, high = (np.float32(limit) - np.asarray(zero, np.float32) for limit in integer_limits(dtype))
    # The processor's maximum returns its second operand where the first is NaN.
    clamped = np.minimum(np.where(np.isnan(x), low, np.maximum(x, low)), high)
    codes: Array = np.rint(clamped).astype(np.int32) + np.asarray(zero, np.int32)
    return codes.astype(dtype)


def integer_limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    info = np.iinfo(dtype)
    return info.min, info.max


def saturate(values: Sums, *, dtype: np.dtype[Any]) -> Array:
    return np.clip(values, *integer_limits(dtype)).astype(dtype)


def to_int32(x: Floats) -> Sums:
    """Nearest, ties to even; what int32 can't hold, NaN too, becomes -2^31, as the processor's conversion has it."""
    fits = np.abs(x) < np.float32(2**31)
    return np.asarray(np.where(fits, np.rint(np.where(fits, x, np.float32(0))), -(2**31)), np.int64).astype(np.int32)


def fused_multiply_add(a: Number, b: Number, c: Number) -> Floats:
    """a * b + c in float32 with one rounding, for finite operands.

    In float64 the product is exact. The sum is rounded to odd there (where it is inexact, the last bit is set), which
    makes the second rounding, to float32, that of the exact value (Boldo and Melquiond, "Emulation of FMA", 2008).
    """
    product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32)
    addend = np.asarray(c, np.float32).astype(np.float64)
    total = np.atleast_1d(product + addend)
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    is_even = (bits & 1) == 0
    odd = np.where((error != 0) & is_even, bits + step, bits).view(np.float64)
    return odd.astype(np.float32).reshape(np.broadcast_shapes(np.shape(product), np.shape(addend)))
