"""QLinearAdd and QLinearMul: two codes become one without an integer sum; the zero point is added before rounding.

    Add, with r_a = scale_a / scale_c, r_b = scale_b / scale_c and FMA(p, q, r) = p * q + r rounded once:
        fixed = zero_c - FMA(r_a, zero_a, r_b * zero_b)
        code  = saturate(round(FMA(a, r_a, FMA(b, r_b, fixed))))
    Mul:
        code  = saturate(round(float32((a - zero_a) * (b - zero_b)) * ((scale_a * scale_b) / scale_c) + zero_c))

Add is not commutative in its last bit. Where the innermost axis of the first operand is broadcast, the kernel gets the
operands in exchanged order. Vector body and tail compute the same. Source: the behaviour of MLAS's AVX2 kernel, which
every x86-64 processor with AVX2 runs; without AVX2 or on Arm the roundings differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Kernel, Node, given, number, zero_point
from pennyweight.evaluate.onnx.integer.rounding import Floats, fused_multiply_add, saturate, to_int32

# Codes, scale, zero point.
_Operand = tuple[Array, np.float32, int]


def _add(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    a, b, zero_c = given(inputs, 0), given(inputs, 3), given(inputs, 7)
    scales, zeros = (number(inputs, 1), number(inputs, 4)), (zero_point(inputs, 2), zero_point(inputs, 5))
    is_turned = is_exchanged(a.shape, b.shape)

    def add(a: Array, b: Array) -> Array:
        first, second = (a, scales[0], zeros[0]), (b, scales[1], zeros[1])
        operands = (second, first) if is_turned else (first, second)
        return saturate(to_int32(_sum(*operands, number(inputs, 6), int(zero_c.reshape(())))), dtype=zero_c.dtype)

    return (_of_pairs(add, a, b),)


def _of_pairs(operation: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """operation(a, b) on codes; where there are more of them than pairs of 8-bit codes, by a table of all pairs."""
    if max(a.size, b.size) <= 2**16:
        return operation(a, b)
    codes = np.arange(256, dtype=np.uint8)
    table = operation(codes.view(a.dtype)[:, None], codes.view(b.dtype)[None, :])
    return np.asarray(table[a.view(np.uint8), b.view(np.uint8)])


def _sum(a: _Operand, b: _Operand, scale_c: np.float32, zero_c: int) -> Floats:
    (codes_a, scale_a, zero_a), (codes_b, scale_b, zero_b) = a, b
    ratio_a, ratio_b = scale_a / scale_c, scale_b / scale_c
    shift = fused_multiply_add(ratio_a, np.float32(zero_a), ratio_b * np.float32(zero_b))
    fixed = np.float32(zero_c) - shift
    inner = fused_multiply_add(codes_b.astype(np.float32), ratio_b, fixed)
    return fused_multiply_add(codes_a.astype(np.float32), ratio_a, inner)


def is_exchanged(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether the runtime walks along `b` with one element of `a`.

    The innermost axis on which either has more than 1 decides; only the axes that both have are looked at, and if all
    of them are 1, the outermost of them counts.
    """
    if not a or not b:
        return not a
    common = list(zip(reversed(a), reversed(b), strict=False))
    innermost = next((pair for pair in common if max(pair) > 1), common[-1])
    return innermost[0] <= 1


def _multiply(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    zero_c = given(inputs, 7)
    ratio = (number(inputs, 1) * number(inputs, 4)) / number(inputs, 6)

    def multiply(a: Array, b: Array) -> Array:
        product = (a.astype(np.int32) - zero_point(inputs, 2)) * (b.astype(np.int32) - zero_point(inputs, 5))
        value = product.astype(np.float32) * ratio + np.float32(zero_c.reshape(()))
        return saturate(to_int32(value), dtype=zero_c.dtype)

    return (_of_pairs(multiply, given(inputs, 0), given(inputs, 3)),)


def _has_bytes(node: Node, inputs: Inputs) -> bool:
    """The runtime adds 16-bit codes by another formula."""
    return given(inputs, 0).dtype.itemsize == 1


PROVIDES: tuple[Kernel, ...] = (
    Kernel("QLinearAdd", _add, covers=_has_bytes),
    Kernel("QLinearMul", _multiply, covers=_has_bytes),
)
