"""QLinearConv: an integer convolution, then one float32 multiplication and rounding an output.

    sum[o]  = bias[o] + sum_k (x_k - zero_x) * (w_ok - zero_w)                           int32, wrapping
    code[o] = round(clamp(float32(sum[o]) * m[o])) + zero_y,  m[o] = (scale_x * scale_w[o]) / scale_y

with both scale operations in float32 in that order. Padding is zero_x, so it adds nothing.
Source: the behaviour of ONNX Runtime's QLinearConv; on a processor without VNNI its kernels for uint8 inputs and
int8 weights saturate sums of two products to int16, which is not simulated and shows as a difference.
"""

from __future__ import annotations

import numpy as np
import torch

from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Kernel, Node, given, number, optional, zero_point
from pennyweight.evaluate.onnx.integer.rounding import Sums, requantize
from pennyweight.evaluate.onnx.integer.spatial import Windows

_CONVOLVE = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)


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
    """int32 [n, out, *spatial] of x [n, in, *spatial], with the bias."""
    w = given(inputs, 3)
    zero_w = given(inputs, 5).astype(np.int64).reshape(-1, *[1] * (w.ndim - 1))
    centred_x = torch.from_numpy(x.astype(np.float64) - zero_point(inputs, 2))
    centred_w = torch.from_numpy((w - zero_w).astype(np.float64))
    windows = Windows.of(node, x.shape[2:], w.shape[2:])
    edges = [size for pair in zip(windows.before[::-1], windows.after[::-1], strict=True) for size in pair]
    # float64 holds every sum of fewer than 2^37 products of 8-bit numbers exactly, in whatever order they're added.
    sums = _CONVOLVE[x.ndim - 3](
        torch.nn.functional.pad(centred_x, edges),
        centred_w,
        stride=windows.strides,
        dilation=windows.dilations,
        groups=node.attributes.get("group", 1),
    )
    bias = optional(inputs, 8)
    whole = sums.numpy().astype(np.int64)
    return np.asarray(whole if bias is None else whole + bias.reshape(-1, *[1] * (x.ndim - 2))).astype(np.int32)


def _is_known(node: Node, inputs: Inputs) -> bool:
    return 3 <= given(inputs, 0).ndim <= 5


PROVIDES: tuple[Kernel, ...] = (Kernel("QLinearConv", _convolve, covers=_is_known),)
