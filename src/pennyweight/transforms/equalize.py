"""Cross-layer equalization: what makes a channel and what reads it get equal ranges.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE, SWEEPS = 1e-3, 20


@dataclass(frozen=True)
class Between:
    """A matrix between numbered channels; number 0 stands for all that must stay as they are.

    w        float [out, in], of a grouped convolution [out, in of a group x kernel]
    rows     int64 [out]: the channel that each row makes
    columns  int64 [groups, in]: the channel that each column reads, for every group of rows
    """

    w: Tensor
    rows: Tensor
    columns: Tensor

    def scaled(self, s: Tensor) -> Tensor:
        """diag(1 / s_rows) W diag(s_columns) in float64, for s float64 by number."""
        groups, inputs = self.columns.shape
        grouped = self.w.double().reshape(groups, -1, inputs) * s[self.columns][:, None]
        return grouped.reshape(self.w.shape) / s[self.rows][:, None]

    def ranges(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The largest |w| of the rows that make each channel and of the columns that read it, 0 for none."""
        size = self.scaled(s).abs()
        groups, inputs = self.columns.shape
        made = torch.zeros_like(s).scatter_reduce(0, self.rows, size.amax(1), "amax")
        read = size.reshape(groups, -1, inputs).amax(1).flatten()
        return made, torch.zeros_like(s).scatter_reduce(0, self.columns.flatten(), read, "amax")


@dataclass(frozen=True)
class Equalizing:
    """s       float64 [count], s[0] = 1
    sweeps  how many it took
    """

    s: Tensor
    sweeps: int


def equalizing_scales(
    matrices: Sequence[Between], count: int, *, sweeps: int = SWEEPS, tolerance: float = TOLERANCE
) -> Equalizing:
    """Scales of `count` channels (0 included) with which every channel's ranges are equal,

        W1' = S⁻¹ W1,  W2' = W2 S:      s_i <- s_i sqrt(r1_i r2_i) / r2_i

    r1_i = max |W1'[i, :]| of what makes it, r2_i = max |W2'[:, i]| of what reads it, for the channels that one matrix
    makes after those of another, until no scale changes by more than `tolerance` or `sweeps` are done. Of several
    makers (or readers) that have channels in common the largest counts, when each is measured by its own peak. Where a
    depthwise matrix stands between two, s1 = r1 / (r1 r2 r3)^(1/3) and s2 = (r1 r2 r3)^(1/3) / r3 are where that ends.
    A channel that is zero on one side keeps the scale 1.
    """
    s = torch.ones(count, dtype=torch.float64)
    sets = _sets(matrices, count)
    for sweep in range(1, sweeps + 1):
        largest = 0.0
        for channels, around, power in sets:
            ranges = [[side * channels for side in matrix.ranges(s)] for matrix in around]
            made, read = (_largest(side) for side in zip(*ranges, strict=True))
            both = channels & (made > 0) & (read > 0)
            factors = torch.where(both, (made / read) ** power, 1.0)
            s = s * factors
            largest = max(largest, float((factors - 1).abs().max()))
        if largest <= tolerance:
            return Equalizing(s, sweep)
    return Equalizing(s, sweeps)


def _largest(ranges: Sequence[Tensor]) -> Tensor:
    """The largest of several ranges of each channel, all brought to one peak first, the geometric mean of theirs."""
    peaks = torch.stack(list(ranges)).amax(1)
    counted = [one / peak for one, peak in zip(ranges, peaks, strict=True) if peak > 0]
    if not counted:
        return ranges[0]
    return torch.stack(counted).amax(0) * peaks[peaks > 0].log().mean().exp()


def _sets(matrices: Sequence[Between], count: int) -> list[tuple[Tensor, list[Between], float]]:
    """Channels that are changed at once (bool [count]), the matrices that they touch, and the power of r1 / r2.

    A matrix that reads what it makes (a shortcut around it alone) changes on both sides: half the way, or the scales
    of two channels would overtake each other for ever.
    """
    taken = torch.zeros(count, dtype=torch.bool)
    taken[0] = True
    found = []
    for matrix in matrices:
        channels = torch.zeros_like(taken)
        channels[matrix.rows] = True
        channels &= ~taken
        taken |= channels
        around = [m for m in matrices if channels[m.rows].any() or channels[m.columns].any()]
        reads_itself = any(bool(channels[m.rows].any() and channels[m.columns].any()) for m in around)
        if channels.any():
            found.append((channels, around, 0.25 if reads_itself else 0.5))
    return found
