"""Functions of one code, which the runtime tabulates: each is decoded, mapped in float32 and quantized again.

    code_y = quantize(f(dequantize(code_x)))

The logistic function is MLAS's rational approximation: for x clamped to [-18, 18], x * P(x^2) / Q(x^2) + 1/2, clamped
below at 0, Horner's scheme with fused multiply-adds, the coefficients being Eigen's.
Source: the behaviour of ONNX Runtime's QLinearSigmoid, QLinearLeakyRelu, QLinearConcat and QLinearWhere.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Kernel, Node, given, number, zero_point
from pennyweight.evaluate.onnx.integer.rounding import Floats, dequantize, fused_multiply_add, quantize

_P = (4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03, 2.48287947061529e-01)
_Q = (
    6.10247389755681e-13,
    5.76102136993427e-09,
    6.29106785017040e-06,
    1.70198817374094e-03,
    1.16817656904453e-01,
    9.93151921023180e-01,
)


def logistic(x: Floats) -> Floats:
    """1 / (1 + exp(-x)) as MLAS approximates it with AVX2 and FMA; float32."""
    x = np.clip(x, np.float32(-18), np.float32(18))
    square = x * x
    numerator = x * _horner(_P, square)
    value: Floats = numerator / _horner(_Q, square) + np.float32(0.5)
    return np.maximum(value, np.float32(0))


def _horner(coefficients: tuple[float, ...], x: Floats) -> Floats:
    values = [np.full_like(x, np.float32(value)) for value in coefficients]
    return reduce(lambda total, value: fused_multiply_add(total, x, value), values)


def _sigmoid(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    return (_encoded(logistic(_decoded(inputs)), inputs),)


def _leaky_relu(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    x = _decoded(inputs)
    alpha = np.float32(node.attributes.get("alpha", 0.01))
    return (_encoded(np.where(x >= 0, x, alpha * x), inputs),)


def _decoded(inputs: Inputs) -> Floats:
    return dequantize(given(inputs, 0), number(inputs, 1), zero_point(inputs, 2))


def _encoded(y: Floats, inputs: Inputs) -> Array:
    return quantize(y, number(inputs, 3), zero_point(inputs, 4), dtype=given(inputs, 0).dtype)


def _rescaled(inputs: Inputs, x: int, y: int) -> Array:
    """The codes at `x` in the scale and zero point at `y`; copied where they have the same."""
    codes, scale, zero = given(inputs, x), number(inputs, x + 1), zero_point(inputs, x + 2)
    if scale == number(inputs, y) and zero == zero_point(inputs, y + 1):
        return codes
    return quantize(dequantize(codes, scale, zero), number(inputs, y), zero_point(inputs, y + 1), dtype=codes.dtype)


def _concat(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    parts = [_rescaled(inputs, position, 0) for position in range(2, len(inputs), 3)]
    return (np.concatenate(parts, axis=node.attributes["axis"]),)


def _where(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    return (np.where(given(inputs, 0), _rescaled(inputs, 1, 7), _rescaled(inputs, 4, 7)),)


def _is_unsigned(node: Node, inputs: Inputs) -> bool:
    """With int8 the runtime reads its table at negative places."""
    return given(inputs, 1).dtype == np.uint8


PROVIDES: tuple[Kernel, ...] = (
    Kernel("QLinearSigmoid", _sigmoid),
    Kernel("QLinearLeakyRelu", _leaky_relu),
    Kernel("QLinearConcat", _concat),
    Kernel("QLinearWhere", _where, covers=_is_unsigned),
)
