"""Schemes: number format + what shares a scale + how scales, zero points and offsets are stored; and their fitting."""

from pennyweight.schemes.fit import fit_scales
from pennyweight.schemes.names import parse_scheme
from pennyweight.schemes.parameters import Decoded, Parameters
from pennyweight.schemes.quantized import QuantizedWeight
from pennyweight.schemes.reexpress import reexpressed
from pennyweight.schemes.scheme import Scheme
from pennyweight.schemes.storage import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    ScaleSpec,
    ZeroSpec,
)

__all__ = [
    "Decoded",
    "Granularity",
    "Parameters",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QuantizedWeight",
    "ScaleSpec",
    "Scheme",
    "ZeroSpec",
    "fit_scales",
    "parse_scheme",
    "reexpressed",
]
