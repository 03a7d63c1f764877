"""Number formats that are a table: a few values in rising order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pennyweight.core.errors import UsageError
from pennyweight.formats.base import NumberFormat

# Dettmers et al., "QLoRA" (2023), appendix E: quantiles of the normal distribution, with an exact 0.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


# The table of ggml's IQ4_NL and IQ4_XS (kvalues_iq4nl): integers, closer together towards the middle, without a 0.
_IQ4_NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)


@dataclass(frozen=True)
class Codebook:
    """`values` [at most 2**bits], rising: code i means values[i]. The encoder never emits the codes of `unused`.

    A number halfway between two values goes to the even code. `unused` gives values to the codes after those of
    `values`, so that every code decodes.

    >>> Codebook("thirds", 2, (-1.0, 0.0, 1.0), unused=(2.0,)).nearest(torch.tensor([-0.5, 0.5, 9.0]))
    tensor([-1.,  1.,  1.])
    """

    name: str
    bits: int
    values: tuple[float, ...]
    unused: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or len(self.values) + len(self.unused) != 2**self.bits:
            raise UsageError(
                f"{self.name}: {len(self.values)} values and {len(self.unused)} unused ones given for "
                f"{self.bits} bits: give 1 to 8 bits and a value for every code"
            )
        if list(self.values) != sorted(set(self.values)) or not all(map(math.isfinite, self.values)):
            raise UsageError(f"{self.name}: values must be finite and rise from code to code: sort them")

    @property
    def smallest(self) -> float:
        return self.values[0]

    @property
    def largest(self) -> float:
        return self.values[-1]

    def nearest(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)).to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        return nearest_index(x, self.values).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return lookup(codes, (*self.values, *self.unused))


def nearest_index(x: Tensor, values: tuple[float, ...]) -> Tensor:
    """int32 indices of the nearest of the rising `values`; halfway between two, the even index."""
    # Halves are widened exactly; a double keeps its own bits, so that no number is rounded twice.
    exact = (x if x.dtype == torch.float64 else x.float()).contiguous()
    return torch.bucketize(exact, _boundaries(values, exact.dtype, exact.device), out_int32=True)


def lookup(codes: Tensor, values: tuple[float, ...]) -> Tensor:
    """float32 values[codes]."""
    return torch.take(_table(values, codes.device), codes.long())


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def _boundaries(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each but the last value the largest number of type `dtype` that goes to it or below."""
    lower = torch.tensor(values[:-1], dtype=torch.float64)
    middles = lower / 2 + torch.tensor(values[1:], dtype=torch.float64) / 2
    # A middle belongs to the value below it where that has the even index.
    is_even = torch.arange(len(lower)) % 2 == 0
    rounded = middles.to(dtype)
    is_above = torch.where(is_even, rounded.double() > middles, rounded.double() >= middles)
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(is_above, below, rounded).to(device)


NF4 = Codebook("nf4", 4, _NF4)
IQ4_NL = Codebook("iq4_nl", 4, _IQ4_NL)
# Code 3 decodes to 2, as value = code - 1 gives in GGUF's two-bit ternary type; no encoder emits it.
TERNARY = Codebook("ternary", 2, (-1.0, 0.0, 1.0), unused=(2.0,))
# Levels at equal distances without a zero: Liu et al., "ParetoQ" (2025).
BALANCED = Codebook("bal2", 2, (-1.5, -0.5, 0.5, 1.5))

PROVIDES: tuple[NumberFormat, ...] = (NF4, IQ4_NL, TERNARY, BALANCED)
