"""Schemes and histograms for the tests of ranges."""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.formats.integer import Int
from pennyweight.schemes.activation import UINT8, ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram

UINT8_ASYMMETRIC = ActivationScheme(UINT8)
SCHEMES = [
    UINT8_ASYMMETRIC,
    ActivationScheme(UINT8, is_symmetric=True),
    ActivationScheme(Int(8)),
    ActivationScheme(Int(8), is_symmetric=True),
    ActivationScheme(Int(4, signed=False)),
    ActivationScheme(Int(4), is_symmetric=True),
    ActivationScheme(Int(2, signed=False)),
    ActivationScheme(Int(2), is_symmetric=True),
]


def histogram_of(*parts: Tensor, bins: int = 2048) -> Histogram:
    found = Histogram.zero(bins)
    for part in parts:
        found = found.update(part)
    return found


def squared_error(x: Tensor, parameters: ActivationParameters, power: float = 2.0) -> float:
    """mean |x - Q(x)|^power of the numbers themselves, in float64."""
    return float((parameters.round_trip(x).double() - x.double()).abs().pow(power).mean())


def gelu_like(count: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.gelu(torch.randn(count, generator=torch.Generator().manual_seed(seed)))
