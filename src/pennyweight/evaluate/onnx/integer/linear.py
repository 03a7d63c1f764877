"""Matrix products of codes: QGemm, QLinearMatMul, and MatMulIntegerToFloat, whose result stays float32.

    sum = bias + sum_k (a_k - zero_a) * (b_k - zero_b)                     int32, wrapping
    codes:   round(clamp(float32(sum) * m)) + zero_y,  m = (alpha * scale_a * scale_b) / scale_y
    floats:  float32(sum) * (alpha * scale_a * scale_b)  [+ float bias]

each operation in float32, from left to right; alpha only in QGemm. scale_b and zero_b may be per column.
Source: the behaviour of ONNX Runtime's kernels of these names.
"""

from __future__ import annotations

import numpy as np

from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Kernel, Node, given, number, optional, zero_point
from pennyweight.evaluate.onnx.integer.rounding import Floats, Sums, requantize


def _product(a: Array, zero_a: int, b: Array, zero_b: Array | int) -> Sums:
    # Exact in float64 below 2^37 terms; converted to int64 first, the value wraps as int32 sums do.
    sums = (a.astype(np.float64) - zero_a) @ (b.astype(np.float64) - zero_b)
    return sums.astype(np.int64).astype(np.int32)


def _codes(sums: Sums, multiplier: Array, scale_y: np.float32, zero_y: Array) -> Array:
    return requantize(sums, multiplier / scale_y, int(zero_y.reshape(())), dtype=zero_y.dtype)


def _floats(sums: Sums, multiplier: Array) -> Floats:
    return np.asarray(sums.astype(np.float32) * multiplier, np.float32)


def _gemm(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    a, b = given(inputs, 0), given(inputs, 3)
    a = a.T if node.flag("transA") else a
    b = b.T if node.flag("transB") else b
    sums = _product(a, zero_point(inputs, 2), b, given(inputs, 5).astype(np.int32))
    bias = optional(inputs, 6)
    sums = sums if bias is None else sums + bias
    multiplier = np.float32(node.attributes.get("alpha", 1.0)) * number(inputs, 1) * given(inputs, 4)
    if optional(inputs, 8) is None:
        return (_floats(sums, multiplier),)
    return (_codes(sums, multiplier, number(inputs, 7), given(inputs, 8)),)


def _matmul(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    sums = _product(given(inputs, 0), zero_point(inputs, 2), given(inputs, 3), given(inputs, 5).astype(np.int32))
    return (_codes(sums, number(inputs, 1) * given(inputs, 4), number(inputs, 6), given(inputs, 7)),)


def _matmul_to_float(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    zero_b = optional(inputs, 5)
    zeros = 0 if zero_b is None else zero_b.astype(np.int32)
    sums = _product(given(inputs, 0), zero_point(inputs, 4), given(inputs, 1), zeros)
    product = _floats(sums, number(inputs, 2) * given(inputs, 3))
    bias = optional(inputs, 6)
    return (product if bias is None else product + bias,)


def _has_one_scale(node: Node, inputs: Inputs) -> bool:
    """scale_a is one number, and scale_b one or one a column; the runtime multiplies in another order otherwise."""
    scale_b = given(inputs, 3)
    return given(inputs, 2).size == 1 and (scale_b.size == 1 or scale_b.size == given(inputs, 1).shape[-1])


PROVIDES: tuple[Kernel, ...] = (
    Kernel("QGemm", _gemm),
    Kernel("QLinearMatMul", _matmul),
    Kernel("MatMulIntegerToFloat", _matmul_to_float, covers=_has_one_scale),
)
