"""The error that rounding to given parameters makes, seen on a histogram."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.schemes.activation import ActivationParameters
from pennyweight.stats.histogram import Histogram

# Parameters that are looked at together.
_CHUNK = 16
# Bins narrower than this many steps count with their middle: the difference of integrals would be mostly rounding.
_NARROW = 1e-6


def rounding_error(histogram: Histogram, found: Sequence[ActivationParameters], *, power: float = 2.0) -> Tensor:
    """mean over all numbers of |x - Q(x)|^power for each of `found`: float64 [found], on the CPU.

    The numbers of a bin count as spread evenly over it. With t = x / scale, the nearest step that can be stored
    r(t) = clamp(round(t), lowest, highest) and d = t - r, the integral of |d|^power up to t is

        G(t) = r (1/2)^power / (power + 1) + sign(d) |d|^(power + 1) / (power + 1)

    so that a bin from a to b has the mean error (G(b) - G(a)) / (b - a): O(bins) for each of `found`, and exact for
    bins as wide as several steps too, where the error at their middle would say little.
    """
    live = histogram.counts.cpu() > 0
    start, stop = (bound[live] for bound in histogram.bounds)
    share = histogram.counts.cpu()[live].double() / max(histogram.count, 1)

    def errors(part: slice) -> Tensor:
        scale, lowest, highest = _steps(found[part])
        a, b = start / scale, stop / scale
        mean = (_integral(b, lowest, highest, power) - _integral(a, lowest, highest, power)) / (b - a)
        middle = (a + b) / 2
        at_middle = (middle - middle.round().clamp(lowest, highest)).abs().pow(power)
        error: Tensor = torch.where(b - a < _NARROW, at_middle, mean) @ share
        return error.mul_(scale[:, 0].pow(power))

    return torch.cat([torch.zeros(0, dtype=torch.float64), *parallel_map(errors, chunks(len(found), _CHUNK))])


def _steps(found: Sequence[ActivationParameters]) -> tuple[Tensor, Tensor, Tensor]:
    """scale, and the lowest and highest number of steps from 0 that can be stored; float64 [found, 1] each."""
    rows = [(p.scale, p.element.smallest - p.zero, p.element.largest - p.zero) for p in found]
    scale, lowest, highest = torch.tensor(rows, dtype=torch.float64).unsqueeze(1).unbind(2)
    return scale, lowest, highest


def _integral(t: Tensor, lowest: Tensor, highest: Tensor, power: float) -> Tensor:
    r = t.round().clamp_(lowest, highest)
    d = t - r
    return (r * math.pow(0.5, power) + d.sign() * d.abs().pow_(power + 1)) / (power + 1)
