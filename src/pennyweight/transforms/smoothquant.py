"""SmoothQuant: outliers of activations are moved into the weights.

Xiao et al., "SmoothQuant" (2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.transforms.base import Rescaling, Weighed


@dataclass(frozen=True)
class SmoothQuant:
    """s_j = max|x_j|^a / max|w_j|^(1-a), so that x / s and W diag(s) are equally hard to round (a = strength).

    It helps where activations are rounded too, with one scale a token or tensor, for which a channel of outliers is
    too wide. Weights alone gain nothing from it. A channel of zeros keeps 1.
    """

    strength: float = 0.5
    name: str = "smoothquant"

    def choose(self, readers: list[Weighed], size: int) -> Tensor | None:
        known = [(reader, reader.magnitude) for reader in readers if reader.magnitude is not None and reader.w.numel()]
        if not known:
            return None
        x = _largest_per_channel([(reader.source, magnitude.largest) for reader, magnitude in known], size)
        w = _largest_per_channel([(reader.source, reader.w.float().abs().amax(0)) for reader, _ in known], size)
        s = x**self.strength / w ** (1 - self.strength)
        return torch.where((x > 0) & (w > 0), s, 1.0)


def _largest_per_channel(of: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """The largest entry of all columns that are the same channel, [size]; columns of no channel are left out."""
    largest = torch.zeros(size + 1)
    for source, columns in of:
        largest.scatter_reduce_(0, source % (size + 1), columns.cpu(), "amax")
    return largest[:size]


PROVIDES: tuple[Rescaling, ...] = (SmoothQuant(),)
