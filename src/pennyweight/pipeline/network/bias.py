"""Bias correction: what rounding shifts the mean of a site's output by goes into its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), the empirical form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mean_shift(original: Sequence[Tensor], rounded: Sequence[Tensor], axis: int) -> Tensor | None:
    """mean(y - ŷ) over everything but the channels, which lie along `axis`; float64 [channels].

    `original` has the outputs y of the float network in each batch, `rounded` ŷ, `axis` below 0. None where adding it
    does not bring the outputs nearer: the shift that one half of the samples shows must lessen the squared error of the
    other half.
    """
    sums = [torch.zeros(0), torch.zeros(0)]
    counts, first = [0, 0], 0
    for y, other in zip(original, rounded, strict=True):
        samples = (y - other).movedim(axis, -1)
        # Without a batch axis the tensor is one sample.
        samples = samples[None] if y.dim() == -axis else samples
        for half in range(2):
            away = samples[(first + half) % 2 :: 2]
            total = away.double().sum(tuple(range(away.dim() - 1)))
            sums[half] = total if not counts[half] and not sums[half].numel() else sums[half] + total
            counts[half] += away.numel() // max(1, away.shape[-1])
        first += samples.shape[0]
    shift = (sums[0] + sums[1]) / max(1, sum(counts))
    if not all(counts):
        return shift
    # sum |d - s|² - sum |d|² = n |s|² - 2 s sum d.
    tried, seen = sums[0] / counts[0], sums[1] / counts[1]
    return shift if float((tried * (tried - 2 * seen)).sum()) < 0 else None


def channel_axis(module: nn.Module) -> int:
    """Where the channels of what `module` gives lie, counted from the last axis."""
    axes = len(getattr(module, "kernel_size", ()))
    return -1 - axes


def add_bias_(module: nn.Module, shift: Tensor) -> None:
    """Let `module` add `shift` [channels] to what it gives; a bias is made where it has none."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        before = bias.double() if isinstance(bias, Tensor) else 0.0
        module.bias = nn.Parameter((before + shift).to(weight.dtype), requires_grad=weight.requires_grad)


def shifted(y: Tensor, shift: Tensor, axis: int) -> Tensor:
    """`y` with `shift` added along `axis`."""
    return y + shift.to(y.dtype).view(-1, *[1] * (-1 - axis))
