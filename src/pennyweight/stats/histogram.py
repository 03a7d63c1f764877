"""How the numbers on an edge of a network are distributed, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from pennyweight.core.errors import DataError, UsageError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.stats.exact_sum import exact_sum_, real, whole
from pennyweight.stats.moving_range import MovingRange

BINS = 2048
# Elements that are looked at together: what is made of them stays in a core's cache.
_CHUNK = 1 << 18
# Parts of a tensor that threads take; each has one array of counts.
_PARTS = 32
# Width of the narrowest bins, 2**-126: the reciprocals of all widths are float32 numbers.
_NARROWEST = -126
# Positions of bins are computed in float32 and must be exact.
_MOST_BINS = 1 << 20


@dataclass(frozen=True, eq=False)
class Histogram:
    """Numbers other than 0 counted in bins of one width, a power of two, and what is known of all numbers exactly.

    bins      how many bins there may be: the width is the smallest (not below 2**-126) with which no more are needed
    counts    int64 [below + above]; with k = 0, 1, ... number below + k counts x in [k, k + 1) * width, x > 0, and
              number below - 1 - k counts those with -x there. The first and the last hold `low` and `high`, so
              that the bins always meet at 0
    below     bins of negative numbers
    exponent  width = 2**exponent
    count     all numbers, of which `zeros` are 0; `low` and `high` are the smallest and the largest, 0 without any
    total, squares   their sum and the sum of their squares, exact, in units of 2**-298
    moving    the moving average of the range: the only part that depends on how numbers are cut into batches

    All but `moving` is the same, bit for bit, in whatever parts and order the numbers come, on any number of threads.
    """

    bins: int
    counts: Tensor
    below: int = 0
    exponent: int = _NARROWEST
    count: int = 0
    zeros: int = 0
    low: float = 0.0
    high: float = 0.0
    total: int = 0
    squares: int = 0
    moving: MovingRange = field(default_factory=MovingRange)

    @staticmethod
    def zero(bins: int = BINS, device: torch.device | str = "cpu") -> Histogram:
        if not 2 <= bins <= _MOST_BINS:
            raise UsageError(f"a histogram of {bins} bins: give 2 to {_MOST_BINS}")
        return Histogram(bins, torch.zeros(0, dtype=torch.int64, device=device))

    @property
    def width(self) -> float:
        return 2.0**self.exponent

    @property
    def mean(self) -> float:
        """0 without numbers."""
        return real(self.total) / max(self.count, 1)

    @property
    def mean_square(self) -> float:
        return real(self.squares) / max(self.count, 1)

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return max(-self.low, self.high)

    @property
    def is_one_magnitude(self) -> bool:
        """Whether every number is 0, peak or -peak, and not all are 0: masks, constants."""
        peak = whole(self.peak)
        return peak > 0 and self.squares == whole(self.peak**2) * (self.count - self.zeros)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where each bin begins and ends, float64 [below + above] on the CPU, cut to [low, high]."""
        edges = torch.arange(-self.below, len(self.counts) - self.below + 1, dtype=torch.float64) * self.width
        edges = edges.clamp_(self.low, self.high)
        return edges[:-1], edges[1:]

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """How many negative, and how many positive numbers have a magnitude in [k, k + 1) * width: int64 [below] and
        [above], on the CPU."""
        counts = self.counts.cpu()
        return counts[: self.below].flip(0), counts[self.below :]

    @property
    def magnitudes(self) -> Tensor:
        """How many numbers other than 0 have a magnitude in [k, k + 1) * width: int64 [longer side], on the CPU."""
        longest = max(len(side) for side in self.sides)
        return torch.stack([pad(side, (0, longest - len(side))) for side in self.sides]).sum(0)

    def update(self, x: Tensor, *, name: str = "activations") -> Histogram:
        """The histogram with all elements of `x`, of any shape and float type, as well: one batch for `moving`.

        Numbers are read as float32. Raises DataError, which says `name`, where one is not finite or not a float.
        """
        if not x.is_floating_point():
            raise DataError(f"{name}: numbers of type {x.dtype} have no range to quantize: give floats")
        if not x.numel():
            return self
        flat = _flat(x.detach())
        # Adding 0 makes -0 to 0.
        low, high = (float(value.float()) + 0.0 for value in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(_not_finite(flat, name))
        exponent, below, above = _layout(low, high, self.bins)
        size = max(_CHUNK, math.ceil(flat.numel() / _PARTS))
        tally = parallel_map(
            lambda part: _tally(flat[part], exponent, below, above, peak=max(-low, high)), chunks(flat.numel(), size)
        )
        counts = torch.stack([one.counts for one in tally]).sum(0)
        zeros, total, squares = (sum(sums) for sums in zip(*(one.sums for one in tally), strict=True))
        seen = (below, exponent, flat.numel(), zeros, low, high, total, squares, MovingRange().update(low, high))
        return self.merge(Histogram(self.bins, counts, *seen))

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both samples together; for `moving`, the batches of `other` come after this one's."""
        if self.bins != other.bins:
            raise UsageError(f"histograms of {self.bins} and {other.bins} bins cannot be merged: use one number")
        if not self.count or not other.count:
            return self if self.count else other
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent, below, above = _layout(low, high, self.bins)
        counts = self._counts_in(exponent, below, above) + other._counts_in(exponent, below, above)
        return Histogram(
            self.bins,
            counts,
            below,
            exponent,
            self.count + other.count,
            self.zeros + other.zeros,
            low,
            high,
            self.total + other.total,
            self.squares + other.squares,
            self.moving.merge(other.moving),
        )

    def to(self, device: torch.device | str) -> Histogram:
        return replace(self, counts=self.counts.to(device))

    def _counts_in(self, exponent: int, below: int, above: int) -> Tensor:
        """`counts` in bins at least as wide, pairs of neighbours added; a new tensor."""
        # Shifting right rounds down, which takes bin -1 to bin -1 and bin 0 to bin 0, however far.
        shift = min(exponent - self.exponent, 62)
        place = torch.arange(-self.below, len(self.counts) - self.below, device=self.counts.device) >> shift
        return self.counts.new_zeros(below + above).index_add_(0, place + below, self.counts)


def _layout(low: float, high: float, bins: int) -> tuple[int, int, int]:
    """exponent, below, above: the narrowest bins of which `bins` hold the numbers from `low` to `high`."""
    if low == high == 0:
        return _NARROWEST, 0, 0
    exponent = max(_NARROWEST, math.frexp(max(-low, high))[1] - bins.bit_length())
    while True:
        # Exact: both are float32 numbers and the width is a power of two.
        below, above = (math.floor(math.ldexp(end, -exponent)) + 1 if end > 0 else 0 for end in (-low, high))
        if below + above <= bins:
            return exponent, below, above
        exponent += 1


def _flat(x: Tensor) -> Tensor:
    """The elements of `x` in the order in which they lie in memory, where that avoids a copy."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda axis: -strides[axis])
    return x.permute(order).reshape(-1)


def _not_finite(x: Tensor, name: str) -> str:
    nan, infinite = int(x.isnan().sum()), int(x.float().isinf().sum())
    kinds = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (infinite, "infinite")) if count]
    return (
        f"{name}: {' and '.join(kinds)} of {x.numel()} numbers; a range needs finite ones. Look for what makes them "
        f"in the calibration data or before this place in the network, or keep it in float"
    )


@dataclass(frozen=True)
class _Tally:
    """`counts` as in a Histogram; `sums`: zeros, total, squares."""

    counts: Tensor
    sums: tuple[int, int, int]


def _tally(x: Tensor, exponent: int, below: int, above: int, *, peak: float) -> _Tally:
    """What a Histogram of `x` [n], |x| <= `peak`, holds."""
    counts = torch.zeros(below + above, dtype=torch.int64, device=x.device)
    zeros = total = squares = 0
    room = torch.empty(2, min(x.numel(), _CHUNK), dtype=torch.float64, device=x.device)
    for part in chunks(x.numel(), _CHUNK):
        chunk = x[part].float()
        # (Faster than count_nonzero where half of the numbers are 0.)
        none = int((chunk == 0).sum())
        zeros += none
        counts += _bin_counts(chunk, none, exponent, below, above)
        wide, spare = room[:, : chunk.numel()]
        total += exact_sum_(wide.copy_(chunk), spare, peak=peak)
        squares += exact_sum_(wide.copy_(chunk).square_(), spare, peak=peak**2)
    return _Tally(counts, (zeros, total, squares))


def _bin_counts(x: Tensor, zeros: int, exponent: int, below: int, above: int) -> Tensor:
    """The counts of `x`, float32 [n], among whose elements there are `zeros` zeros; int64 [below + above]."""
    # Exact, or so near 0 that it ends in the place of 0 anyway: the width is a power of two.
    place = torch.mul(x, 2.0**-exponent).to(torch.int32)
    # Rounding towards 0 puts both bins next to 0, and 0 itself, in one place.
    left, right = max(below - 1, 0), max(above - 1, 0)
    found = torch.bincount(place.add_(left) if left else place, minlength=left + 1 + right)
    if not below:
        found[0] -= zeros
        return found[:above]
    negative = int((x < 0).sum()) - found[:left].sum() if above else found[left] - zeros
    middle = torch.stack([negative, found[left] - zeros - negative]) if above else negative[None]
    return torch.cat([found[:left], middle, found[left + 1 :]])
