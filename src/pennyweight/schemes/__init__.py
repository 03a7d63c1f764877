"""Schemes: number format + what shares a scale + how scales and zero points are stored; and the fitting of scales."""

from pennyweight.schemes.fit import fit_scales
from pennyweight.schemes.names import parse_scheme
from pennyweight.schemes.quantized import QuantizedWeight
from pennyweight.schemes.scheme import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    ScaleSpec,
    Scheme,
    ZeroSpec,
)

__all__ = [
    "Granularity",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QuantizedWeight",
    "ScaleSpec",
    "Scheme",
    "ZeroSpec",
    "fit_scales",
    "parse_scheme",
]
