"""QLinearConv: an integer convolution, then one float32 multiplication and rounding an output.

    sum[o]  = bias[o] + sum_k (x_k - zero_x) * (w_ok - zero_w)                           int32, wrapping
    code[o] = round(clamp(float32(sum[o]) * m[o])) + zero_y,  m[o] = (scale_x * scale_w[o]) / scale_y

with both scale operations in float32 in that order. Padding is zero_x, so it adds nothing.
Source: the behaviour of ONNX Runtime's QLinearConv; on a processor without VNNI its kernels for uint8 inputs and
int8 weights saturate sums of two products to int16, which is not simulated and shows as a difference.
"""

from __future__ import annotations

import numpy as np

from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Kernel, Node, given, number, optional, zero_point
from pennyweight.evaluate.onnx.integer.rounding import Sums, requantize
from pennyweight.evaluate.onnx.integer.spatial import Windows


def _convolve(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    is_last = node.flag("channels_last")
    x = np.moveaxis(given(inputs, 0), -1, 1) if is_last else given(inputs, 0)
    zero_y = given(inputs, 7)
    multiplier = (number(inputs, 1) * given(inputs, 4)) / number(inputs, 6)
    sums = _sums(node, x, inputs)
    columns = multiplier.reshape(-1, *[1] * (x.ndim - 2))
    codes = requantize(sums, columns, int(zero_y.reshape(())), dtype=zero_y.dtype)
    return (np.moveaxis(codes, 1, -1) if is_last else codes,)


def _sums(node: Node, x: Array, inputs: Inputs) -> Sums:
    """int32 [n, out, *spatial] of x [n, in, *spatial], with the bias: one matrix product for each place in the kernel.

    float64 holds every sum of fewer than 2^37 products of 8-bit numbers exactly, in whatever order they're added.
    """
    w = given(inputs, 3)
    zero_w = given(inputs, 5).astype(np.int64).reshape(-1, *[1] * (w.ndim - 1))
    windows = Windows.of(node, x.shape[2:], w.shape[2:])
    seen = windows.view(x.astype(np.float64) - zero_point(inputs, 2), 0.0)
    centred = (w - zero_w).astype(np.float64)
    sums = np.zeros((len(x), len(w), *windows.outputs))
    for place in np.ndindex(*windows.kernel):
        sums += _product(centred[(..., *place)], seen[(..., *place)], groups=node.attributes.get("group", 1))
    bias = optional(inputs, 8)
    whole = sums.astype(np.int64)
    return np.asarray(whole if bias is None else whole + bias.reshape(-1, *[1] * (x.ndim - 2))).astype(np.int32)


def _product(w: Array, x: Array, *, groups: int) -> Array:
    """w [out, in / groups], x [n, in, *spatial] -> [n, out, *spatial]."""
    parts = x.reshape(len(x), groups, w.shape[1], -1)
    matrices = w.reshape(groups, -1, w.shape[1])
    # With one channel a group the sum has one term.
    products = matrices * parts if w.shape[1] == 1 else matrices @ parts
    return np.asarray(products.reshape(len(x), len(w), *x.shape[2:]))


PROVIDES: tuple[Kernel, ...] = (Kernel("QLinearConv", _convolve),)
