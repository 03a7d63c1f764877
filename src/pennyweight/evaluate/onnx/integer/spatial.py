"""Windows over the spatial axes: how many there are, where padding lies, what each sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pennyweight.evaluate.onnx.integer.base import Array, Node


@dataclass(frozen=True)
class Windows:
    """One entry a spatial axis; `before` and `after` are padding."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    outputs: tuple[int, ...]

    @staticmethod
    def of(node: Node, spatial: Sequence[int], kernel: Sequence[int]) -> Windows:
        """Windows of size `kernel` over axes of sizes `spatial`, by the node's ONNX attributes."""
        rank = len(spatial)
        strides, dilations = node.sizes("strides", [1] * rank), node.sizes("dilations", [1] * rank)
        pads = node.sizes("pads", [0] * 2 * rank)
        auto = node.attributes.get("auto_pad", b"NOTSET").decode()
        axes = [
            _axis(size, window, stride, dilation, (pads[i], pads[rank + i]), auto, is_ceil=node.flag("ceil_mode"))
            for i, (size, window, stride, dilation) in enumerate(zip(spatial, kernel, strides, dilations, strict=True))
        ]
        before, after, outputs = zip(*axes, strict=True)
        return Windows(tuple(kernel), strides, dilations, before, after, outputs)

    def view(self, x: Array, fill: float) -> Array:
        """x [n, c, *spatial] -> [n, c, *outputs, *kernel], with `fill` where a window leaves `x`."""
        reach = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        needed = [(o - 1) * s + r for o, s, r in zip(self.outputs, self.strides, reach, strict=True)]
        after = [max(0, n - b - size) for n, b, size in zip(needed, self.before, x.shape[2:], strict=True)]
        padded = np.pad(x, [(0, 0), (0, 0), *zip(self.before, after, strict=True)], constant_values=fill)
        axes = tuple(range(2, x.ndim))
        seen = np.lib.stride_tricks.sliding_window_view(padded, reach, axes)
        starts = tuple(slice(0, (o - 1) * s + 1, s) for o, s in zip(self.outputs, self.strides, strict=True))
        taken = tuple(slice(None, None, d) for d in self.dilations)
        return seen[(slice(None), slice(None), *starts, *taken)]


def _axis(
    size: int, window: int, stride: int, dilation: int, pads: tuple[int, int], auto: str, *, is_ceil: bool
) -> tuple[int, int, int]:
    """(padding before, padding after, number of windows) along one axis."""
    reach = (window - 1) * dilation + 1
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        count = -(-size // stride)
        total = max(0, (count - 1) * stride + reach - size)
        before = (total + 1) // 2 if auto == "SAME_LOWER" else total // 2
        return before, total - before, count
    before, after = (0, 0) if auto == "VALID" else pads
    room = size + before + after - reach
    count = (-(-room // stride) if is_ceil else room // stride) + 1
    # With rounding up, a window that would begin in the padding behind the end is left out.
    return before, after, count - 1 if is_ceil and (count - 1) * stride >= size + before else count
