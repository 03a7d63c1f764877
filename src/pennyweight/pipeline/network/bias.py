"""Bias correction: what rounding shifts the mean of a site's output by goes into its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), the empirical form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mean_shift(original: Sequence[Tensor], rounded: Sequence[Tensor], axis: int) -> Tensor:
    """What to add to each channel of the outputs, float64 [channels]; `original` has the outputs y of the float network
    in each batch, `rounded` ŷ; channels lie along `axis`, below 0.

    With a and b the means of y - ŷ over the samples of even and of odd numbers it is 2 a b / (a + b), their harmonic
    mean, where they have one sign, else 0. So the squared error of both halves falls in every channel that is shifted:
    s² - 2 s b = s (s - 2 b) < 0, for s is at most twice the smaller. A shift that is mostly chance is left alone. Of a
    single sample it is its own mean.
    """
    sums: list[Tensor | float] = [0.0, 0.0]
    counts, first = [0, 0], 0
    for y, other in zip(original, rounded, strict=True):
        samples = (y - other).movedim(axis, -1)
        # Without a batch axis the tensor is one sample.
        samples = samples[None] if y.dim() == -axis else samples
        for half in range(2):
            away = samples[(first + half) % 2 :: 2]
            sums[half] = away.double().sum(tuple(range(away.dim() - 1))) + sums[half]
            counts[half] += away.numel() // max(1, away.shape[-1])
        first += samples.shape[0]
    a, b = (torch.as_tensor(total) / max(1, count) for total, count in zip(sums, counts, strict=True))
    if not counts[1]:
        return a
    return torch.where(a * b > 0, 2 * a * b / (a + b), torch.zeros_like(a))


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
