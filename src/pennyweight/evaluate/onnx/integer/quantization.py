"""QuantizeLinear and DequantizeLinear: the edges between float32 and codes, per tensor or along an axis."""

from __future__ import annotations

import numpy as np

from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Kernel, Node, given, optional
from pennyweight.evaluate.onnx.integer.rounding import dequantize, quantize


def _along_axis(parameter: Array, x: Array, axis: int) -> Array:
    """A parameter per tensor [] or per slice [n], in a shape that broadcasts against `x`."""
    if parameter.size == 1:
        return parameter.reshape(())
    shape = [1] * x.ndim
    shape[axis] = parameter.size
    return parameter.reshape(shape)


def _quantize(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    x, scale, zero = given(inputs, 0), given(inputs, 1), given(inputs, 2)
    axis = node.attributes.get("axis", 1)
    return (quantize(x, _along_axis(scale, x, axis), _along_axis(zero, x, axis), dtype=zero.dtype),)


def _dequantize(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    codes, scale = given(inputs, 0), given(inputs, 1)
    zero = optional(inputs, 2)
    axis = node.attributes.get("axis", 1)
    zeros = np.int32(0) if zero is None else _along_axis(zero, codes, axis)
    return (dequantize(codes, _along_axis(scale, codes, axis), zeros),)


def _is_simple(node: Node, inputs: Inputs) -> bool:
    """float32 on one side, 8-, 16- or 32-bit integers on the other, no blocks."""
    scale = given(inputs, 1)
    integers = optional(inputs, 2) if node.op == "QuantizeLinear" else given(inputs, 0)
    if integers is None or integers.dtype.kind not in "iu":
        return False
    return bool(scale.dtype == np.float32 and scale.ndim <= 1 and not node.flag("block_size"))


PROVIDES: tuple[Kernel, ...] = (
    Kernel("QuantizeLinear", _quantize, covers=_is_simple),
    Kernel("DequantizeLinear", _dequantize, covers=_is_simple),
)
