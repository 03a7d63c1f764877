"""What the operations of a network's graph do to numbers, as far as rounding them is concerned."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from pennyweight.models.network.identity import SAME, is_identity, name_of
from pennyweight.models.network.lift import bound_arguments

# They put numbers elsewhere, repeat or drop some, but make no new ones; of a pooling that takes the greatest that holds
# too.
_MOVES = frozenset(
    {
        "view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "transpose", "permute", "t",
        "numpy_T", "movedim", "slice", "select", "narrow", "squeeze", "unsqueeze", "expand", "expand_as", "repeat",
        "repeat_interleave", "flip", "roll", "index_select", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
        "max_pool1d", "max_pool2d", "max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
        "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
        "replication_pad3d",
    }
)  # fmt: skip
_CUTS = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk"})
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"})
# One number or one window of one tensor gives one number.
_WITH_KERNEL = frozenset({"sigmoid", "leaky_relu", "avg_pool1d", "avg_pool2d", "avg_pool3d"})


def moved(node: fx.Node) -> fx.Node | None:
    """The value whose numbers `node` only moves, and nothing else but zeros; None where it makes numbers."""
    name = name_of(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if name == "getitem":
        cut = source.args[0] if name_of(source) in _CUTS else None
        return cut if isinstance(cut, fx.Node) else None
    return source if name in _MOVES or name in SAME or _is_plain_pad(node, name) or is_identity(node) else None


def _is_plain_pad(node: fx.Node, name: str) -> bool:
    """Padding with zeros, or with numbers of the tensor."""
    if name == "constant_pad_nd":
        return not bound_arguments(node)["value"]
    return name == "pad" and not bound_arguments(node)["value"]


def clamp_of(node: fx.Node) -> fx.Node | None:
    """The value that `node` clamps between constants."""
    if name_of(node) not in _CLAMPS or not isinstance(node.args[0], fx.Node):
        return None
    bounds = [*node.args[1:], *node.kwargs.values()]
    return None if any(isinstance(bound, fx.Node) for bound in bounds) else node.args[0]


def integer_operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """What `node` computes with, where ONNX Runtime has a kernel that takes and gives integers; else nothing.

    Convolutions and linear maps are left out: their weights decide.
    """
    name, arguments = name_of(node), node.args
    if name in _WITH_KERNEL or is_global_average(node):
        operands: tuple[Any, ...] = arguments[:1]
    elif name in ("add", "mul"):
        operands = () if node.kwargs.get("alpha", 1) != 1 else arguments[:2]
    elif name in ("cat", "concat") and isinstance(arguments[0], list | tuple):
        operands = tuple(arguments[0])
    else:
        operands = ()
    is_tensors = all(isinstance(operand, fx.Node) and is_real(operand) for operand in operands)
    return operands if is_tensors else ()


def is_global_average(node: fx.Node) -> bool:
    """The mean over all axes behind the channels, in one of its forms."""
    name = name_of(node)
    value = getattr(node.args[0], "meta", {}).get("val") if node.args else None
    if not isinstance(value, Tensor) or value.ndim < 3:
        return False
    if name.startswith("adaptive_avg_pool"):
        return set(_list(node.args[1])) == {1} and name == f"adaptive_avg_pool{value.ndim - 2}d"
    axes = bound_arguments(node).get("dim") if name == "mean" else None
    return bool(axes) and {axis % value.ndim for axis in _list(axes)} == set(range(2, value.ndim))


def is_real(node: fx.Node) -> bool:
    """Whether the value is a tensor of floats that is computed, not a parameter."""
    value = node.meta.get("val")
    return node.op != "get_attr" and (value is None or bool(getattr(value, "is_floating_point", bool)()))


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
