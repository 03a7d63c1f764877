"""QLinearSoftmax: exponentials from a table of 256, summed and divided.

Along the axis, with d elements; the largest code is moved to the end of the table:
    table[i] = float32(exp((i - 255 + shift) * scale_x)),   shift = max(0, log(float32_max / d) - 5) / scale_x
    e_i      = table[255 - max(x) + x_i]
    code_i   = saturate(round(e_i * floor(1 / scale_y) / sum e) + zero_y)

The logarithm is float32, exp float64 by the C library's own function; the sum is float32, one addition after the other;
product and quotient of the last line are float64. In effect the scale of the output is 1 / floor(1 / scale_y).
Source: the behaviour of ONNX Runtime's QLinearSoftmax, found by experiment where its sources leave it open.
"""

from __future__ import annotations

import math

import numpy as np

from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Kernel, Node, given, number, zero_point
from pennyweight.evaluate.onnx.integer.rounding import Floats, integer_limits


def _softmax(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    x = given(inputs, 0)
    if node.attributes["opset"] < 13:
        axis = node.attributes.get("axis", 1) % x.ndim
        rows = x.reshape(*x.shape[:axis], -1)
        return (_rows(rows, inputs).reshape(x.shape),)
    axis = node.attributes.get("axis", -1)
    return (np.moveaxis(_rows(np.moveaxis(x, axis, -1), inputs), -1, axis),)


def _rows(x: Array, inputs: Inputs) -> Array:
    """Softmax along the last axis of codes."""
    shifted = 255 - (x.max(-1, keepdims=True).astype(np.int32) - x)
    e = table(number(inputs, 1), x.shape[-1])[shifted]
    total = np.zeros(x.shape[:-1], np.float32)
    for position in range(x.shape[-1]):
        total = total + e[..., position]
    steps = np.floor(np.float32(1) / number(inputs, 3))
    whole = np.rint(e.astype(np.float64) * steps / total[..., None]) + zero_point(inputs, 4)
    codes: Array = np.clip(whole, *integer_limits(x.dtype))
    return codes.astype(x.dtype)


def table(scale: np.float32, length: int) -> Floats:
    """[256] exponentials, scaled so that the sum of `length` of them stays finite."""
    room = np.float32(math.log(np.finfo(np.float32).max / np.float32(length)))
    shift = max(0.0, float(room) - 5) / float(scale)
    return np.array([math.exp((i - 255 + shift) * float(scale)) for i in range(256)], np.float32)


PROVIDES: tuple[Kernel, ...] = (Kernel("QLinearSoftmax", _softmax),)
