"""The range and the mean of each channel on an edge: what bias correction and equalization look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import DataError, ShapeError
from pennyweight.core.parallel import chunks, parallel_map

# Elements of a chunk of channels.
_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class ChannelRange:
    """low, high: the extremes of each channel, float32 [channels], 0 without data; total: the sums, float64 [channels];
    count: numbers seen of each channel.

    `low` and `high` are the same, bit for bit, however numbers come; `total` up to the rounding of float64 sums, and
    on any number of threads.
    """

    low: Tensor
    high: Tensor
    total: Tensor
    count: int = 0

    @staticmethod
    def zero(channels: int, device: torch.device | str = "cpu") -> ChannelRange:
        none = torch.zeros(channels, device=device)
        return ChannelRange(none, none, none.double())

    @property
    def mean(self) -> Tensor:
        """float32 [channels], 0 without data."""
        return (self.total / max(self.count, 1)).float()

    def update(self, x: Tensor, *, axis: int = 1, name: str = "activations") -> ChannelRange:
        """The statistic with `x`, whose axis `axis` is that of channels, as well.

        Raises ShapeError where the channels are others, DataError where a number is not finite; both say `name`.
        """
        channels = self.total.shape[0]
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != channels:
            raise ShapeError(f"{name}: shape {tuple(x.shape)} has not {channels} channels along axis {axis}")
        if not x.numel():
            return self
        rows = x.detach().movedim(axis, 0)
        count = x.numel() // channels
        parts = parallel_map(lambda part: _reduced(rows[part]), chunks(channels, max(1, _CHUNK // count)))
        low, high, total = (torch.cat(found) for found in zip(*parts, strict=True))
        bad = (~(low.isfinite() & high.isfinite())).nonzero().flatten()
        if len(bad):
            raise DataError(
                f"{name}: NaN or infinity in {len(bad)} of {channels} channels, first in channel {int(bad[0])}; look "
                f"for what makes them in the calibration data or before this place in the network"
            )
        return self.merge(ChannelRange(low, high, total, count))

    def merge(self, other: ChannelRange) -> ChannelRange:
        """The statistic of both samples together."""
        if self.total.shape != other.total.shape:
            raise ShapeError(f"{self.total.shape[0]} and {other.total.shape[0]} channels cannot be merged")
        if not self.count or not other.count:
            return self if self.count else other
        return ChannelRange(
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.total + other.total,
            self.count + other.count,
        )


def _reduced(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """low, high (float32) and sum (float64) of each of `rows` [channels, ...]."""
    flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
    low, high = torch.aminmax(flat, dim=1)
    return low.float(), high.float(), flat.sum(1, dtype=torch.float64)
