"""The range whose steps keep most of the distribution's information."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.base import RangeChooser, parameters_for

# How many thresholds are tried, about.
_THRESHOLDS = 256
# Thresholds that one thread takes.
_CHUNK = 32
# Added to every probability, so that a bin which only one of the distributions knows costs much but not everything.
_SMOOTHING = 1e-8


@dataclass(frozen=True)
class Entropy:
    """min over thresholds of i bins of KL(P || Q) (Migacz, 8-bit inference with TensorRT, 2017).

    P   the counts of the first i bins of magnitudes, those beyond added to the last of them
    Q   the same counts without those beyond, merged into as many levels as the scheme has steps on one side, each
        level spread evenly over those of its bins that are not empty

    Level l has the bins k with floor(k levels / i) = l. Both are smoothed and made to sum to 1. Numbers that are 0 are
    left out: every range holds them. The threshold cuts both sides. Fewer thresholds than bins are tried, evenly
    spaced; with no more bins than levels nothing is cut.

    Made for 8 bits. With fewer, Q is a poor image of P wherever it is cut, and what is chosen clips far too much or
    too little: use `mse` there.
    """

    name: str = "entropy"

    def choose(self, histogram: Histogram, scheme: ActivationScheme) -> ActivationParameters:
        is_one_sided = not scheme.is_symmetric and (histogram.low >= 0 or histogram.high <= 0)
        levels = 2 ** (scheme.element.bits - (0 if is_one_sided else 1))
        end = _threshold(histogram.magnitudes.double(), levels) * histogram.width
        return parameters_for(histogram, scheme, low=max(histogram.low, -end), high=min(histogram.high, end))


def _threshold(counts: Tensor, levels: int) -> int:
    """How many of the first bins of `counts` float64 [bins] to keep."""
    bins = len(counts)
    if bins <= levels:
        return bins
    # Backwards, so that the whole range is among them, and is chosen where others are as good.
    tried = range(bins, levels - 1, -max(1, (bins - levels) // _THRESHOLDS))

    def divergences(part: slice) -> list[float]:
        return [_divergence(counts, kept, levels) for kept in tried[part]]

    found = [value for part in parallel_map(divergences, chunks(len(tried), _CHUNK)) for value in part]
    return tried[found.index(min(found))]


def _divergence(counts: Tensor, kept: int, levels: int) -> float:
    """KL(P || Q) in nats of `counts` float64 [bins], cut to the first `kept`; infinity where those hold nothing."""
    inside = counts[:kept]
    if not inside.any():
        return float("inf")
    p = inside.clone()
    p[-1] += counts[kept:].sum()
    # Level l begins at the first bin k with floor(k levels / kept) = l.
    edges = -(-torch.arange(levels + 1) * kept // levels)
    live = (inside > 0).double()
    merged, bins = (pad(values.cumsum(0), (1, 0))[edges].diff() for values in (inside, live))
    q = (merged / bins.clamp_(min=1)).repeat_interleave(edges.diff()) * live
    p, q = _smooth(p), _smooth(q)
    return float((p * (p / q).log()).sum())


def _smooth(counts: Tensor) -> Tensor:
    share = counts / counts.sum() + _SMOOTHING
    return share / share.sum()


PROVIDES: tuple[RangeChooser, ...] = (Entropy(),)
