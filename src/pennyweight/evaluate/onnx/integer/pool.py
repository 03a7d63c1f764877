"""Pools over codes: averages in two kinds of arithmetic, and maxima, which only compare.

    global average:  code = round(clamp(float32(sum of (x - zero_x)) * m)) + zero_y
                     m    = scale_x / (scale_y * float32(size))
    average:         y    = (sum over the window, in float32, row by row, of scale_x * (x - zero_x)) / float32(count)
                     code = saturate(round(y / scale_y + zero_y))

The count has the padding in it only if the node says so. A window that is the whole image, without padding, takes the
first form. Source: the behaviour of ONNX Runtime's QLinearGlobalAveragePool and QLinearAveragePool on x86-64.
"""

from __future__ import annotations

import numpy as np

from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Kernel, Node, given, number, zero_point
from pennyweight.evaluate.onnx.integer.rounding import Floats, dequantize, requantize, saturate, to_int32
from pennyweight.evaluate.onnx.integer.spatial import Windows


def _first(x: Array, *, is_last: bool) -> Array:
    """Channels to axis 1."""
    return np.moveaxis(x, -1, 1) if is_last else x


def _back(x: Array, *, is_last: bool) -> Array:
    return np.moveaxis(x, 1, -1) if is_last else x


def _global_average(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    is_last = node.flag("channels_last")
    return (_back(_mean(_first(given(inputs, 0), is_last=is_last), inputs), is_last=is_last),)


def _mean(x: Array, inputs: Inputs) -> Array:
    """x [n, c, *spatial] -> [n, c, 1, ...]."""
    axes = tuple(range(2, x.ndim))
    size = int(np.prod(x.shape[2:]))
    sums = x.sum(axes, dtype=np.int64, keepdims=True) - size * zero_point(inputs, 2)
    multiplier = number(inputs, 1) / (number(inputs, 3) * np.float32(size))
    return requantize(sums.astype(np.int32), multiplier, zero_point(inputs, 4), dtype=x.dtype)


def _average(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    is_last = node.flag("channels_last")
    x = _first(given(inputs, 0), is_last=is_last)
    windows = Windows.of(node, x.shape[2:], node.attributes["kernel_shape"])
    has_padding = any(windows.before) or any(windows.after)
    if windows.kernel == x.shape[2:] and not has_padding:
        return (_back(_mean(x, inputs), is_last=is_last),)
    floats = dequantize(x, number(inputs, 1), zero_point(inputs, 2))
    means = _in_order(windows.view(floats, 0.0), len(windows.kernel)) / _counts(node, windows, x)
    value: Floats = means / number(inputs, 3) + np.float32(zero_point(inputs, 4))
    return (_back(saturate(to_int32(value), dtype=x.dtype), is_last=is_last),)


def _in_order(seen: Floats, rank: int) -> Floats:
    """The sum over the last `rank` axes in float32, one addition after the other in row order."""
    flat = seen.reshape(*seen.shape[: seen.ndim - rank], -1)
    total = np.zeros(flat.shape[:-1], np.float32)
    for position in range(flat.shape[-1]):
        total = total + flat[..., position]
    return total


def _counts(node: Node, windows: Windows, x: Array) -> Floats:
    """How many elements each window's sum is divided by: float32, broadcast against [n, c, *outputs]."""
    if node.flag("count_include_pad"):
        return np.array(np.prod(windows.kernel), np.float32)
    ones = windows.view(np.ones((1, 1, *x.shape[2:]), np.float32), 0.0)
    return np.asarray(ones.sum(tuple(range(x.ndim, ones.ndim)), dtype=np.float32), np.float32)


def _maximum(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    is_last = node.op == "NhwcMaxPool"
    x = _first(given(inputs, 0), is_last=is_last)
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    windows = Windows.of(node, x.shape[2:], node.attributes["kernel_shape"])
    seen = windows.view(x, lowest)
    return (_back(seen.max(tuple(range(x.ndim, seen.ndim))), is_last=is_last),)


def _is_plain(node: Node, inputs: Inputs) -> bool:
    """No indices are asked for, and padding isn't negative: with auto_pad and strides over the kernel it may be."""
    kernel = node.sizes("kernel_shape", ())
    is_spread = any(s > k for s, k in zip(node.sizes("strides", [1] * len(kernel)), kernel, strict=True))
    is_auto = node.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return len(node.outputs) == 1 and not (is_auto and is_spread)


PROVIDES: tuple[Kernel, ...] = (
    Kernel("QLinearGlobalAveragePool", _global_average),
    Kernel("QLinearAveragePool", _average, covers=_is_plain),
    Kernel("MaxPool", _maximum, "exact", _is_plain),
    Kernel("NhwcMaxPool", _maximum, "exact", _is_plain),
)
