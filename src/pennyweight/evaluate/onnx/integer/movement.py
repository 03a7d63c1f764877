"""Operations that only move values, and float32 operations of one IEEE rounding an element: exact by themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Kernel, Node, given, optional


def _reshape(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    x, shape = given(inputs, 0), given(inputs, 1).tolist()
    if not node.flag("allowzero"):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return (x.reshape(shape),)


def _flatten(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    x = given(inputs, 0)
    axis = node.attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return (x.reshape(int(np.prod(x.shape[:axis])), -1),)


def _axes(node: Node, inputs: Inputs) -> tuple[int, ...] | None:
    """The axes: an input since opset 13, an attribute before."""
    array = optional(inputs, 1)
    return node.attributes.get("axes") if array is None else tuple(array.tolist())


def _squeeze(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    axes = _axes(node, inputs)
    return (np.squeeze(given(inputs, 0), None if axes is None else tuple(axes)),)


def _unsqueeze(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    return (np.expand_dims(given(inputs, 0), _axes(node, inputs) or ()),)


def _transpose(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    return (np.transpose(given(inputs, 0), node.attributes.get("perm")),)


def _concat(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    return (np.concatenate([given(inputs, i) for i in range(len(inputs))], axis=node.attributes["axis"]),)


def _pad(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    x, pads = given(inputs, 0), given(inputs, 1).tolist()
    value = optional(inputs, 2)
    half = len(pads) // 2
    return (np.pad(x, list(zip(pads[:half], pads[half:], strict=True)), constant_values=0 if value is None else value),)


def _is_plain_pad(node: Node, inputs: Inputs) -> bool:
    pads = optional(inputs, 1)
    is_constant = node.attributes.get("mode", b"constant") == b"constant"
    return bool(is_constant and pads is not None and pads.min() >= 0 and optional(inputs, 3) is None)


def _slice(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    x = given(inputs, 0)
    starts, ends = given(inputs, 1).tolist(), given(inputs, 2).tolist()
    axes, steps = optional(inputs, 3), optional(inputs, 4)
    parts = [slice(None)] * x.ndim
    for i, axis in enumerate(range(len(starts)) if axes is None else axes.tolist()):
        parts[axis] = slice(starts[i], ends[i], 1 if steps is None else int(steps[i]))
    return (x[tuple(parts)],)


def _is_forward_slice(node: Node, inputs: Inputs) -> bool:
    steps = optional(inputs, 4)
    return len(inputs) >= 3 and (steps is None or bool((steps > 0).all()))


def _gather(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    return (np.asarray(np.take(given(inputs, 0), given(inputs, 1), axis=node.attributes.get("axis", 0))),)


def _split(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    x, sizes = given(inputs, 0), optional(inputs, 1)
    axis = node.attributes.get("axis", 0)
    # Without sizes the parts are equal but for the last, which may be smaller.
    part = -(-x.shape[axis] // len(node.outputs))
    ends = np.arange(1, len(node.outputs)) * part if sizes is None else np.cumsum(sizes)[:-1]
    return tuple(np.split(x, ends, axis=axis))


def _where(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    return (np.where(given(inputs, 0), given(inputs, 1), given(inputs, 2)),)


def _identity(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    return (given(inputs, 0),)


def _shape(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    sizes = given(inputs, 0).shape[node.attributes.get("start", 0) : node.attributes.get("end")]
    return (np.array(sizes, np.int64),)


def _relu(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    x = given(inputs, 0)
    return (np.maximum(x, np.zeros((), x.dtype)),)


def _clip(node: Node, inputs: Inputs) -> tuple[Array, ...]:
    low, high = optional(inputs, 1), optional(inputs, 2)
    x = given(inputs, 0)
    x = x if low is None else np.maximum(x, low)
    return (x if high is None else np.minimum(x, high),)


def _binary(operation: Callable[[Array, Array], Array]) -> Callable[[Node, Inputs], tuple[Array, ...]]:
    def run(node: Node, inputs: Inputs) -> tuple[Array, ...]:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return (np.asarray(operation(given(inputs, 0), given(inputs, 1))),)

    return run


def _is_float(node: Node, inputs: Inputs) -> bool:
    return len(inputs) >= 1 and given(inputs, 0).dtype == np.float32


PROVIDES: tuple[Kernel, ...] = (
    Kernel("Reshape", _reshape, "exact"),
    Kernel("Flatten", _flatten, "exact"),
    Kernel("Squeeze", _squeeze, "exact"),
    Kernel("Unsqueeze", _unsqueeze, "exact"),
    Kernel("Transpose", _transpose, "exact"),
    Kernel("Concat", _concat, "exact"),
    Kernel("Pad", _pad, "exact", _is_plain_pad),
    Kernel("Slice", _slice, "exact", _is_forward_slice),
    Kernel("Gather", _gather, "exact"),
    Kernel("Split", _split, "exact"),
    Kernel("Where", _where, "exact"),
    Kernel("Identity", _identity, "exact"),
    Kernel("Shape", _shape, "exact"),
    Kernel("Relu", _relu, "exact", _is_float),
    Kernel("Clip", _clip, "exact", _is_float),
    Kernel("Add", _binary(np.add), "exact", _is_float),
    Kernel("Sub", _binary(np.subtract), "exact", _is_float),
    Kernel("Div", _binary(np.divide), "exact", _is_float),
    Kernel("Mul", _binary(np.multiply), "exact", _is_float),
)
