"""Floats of 4 to 8 bits; the code is the bit pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pennyweight.core.errors import UsageError
from pennyweight.formats.base import NumberFormat
from pennyweight.formats.codebook import lookup, nearest_index

# What the highest exponent holds: "finite" only numbers, "fn" one NaN at its very end, "ieee" infinity and NaNs.
Specials = Literal["finite", "fn", "ieee"]


@dataclass(frozen=True)
class Minifloat:
    """(-1)**sign * 2**(max(e, 1) - bias) * (f / 2**mantissa + (e > 0)), from the highest bit: sign, exponent e, f.

    Ties go to the even mantissa; what is too large saturates to the largest finite number. Codes of infinity, NaN and
    -0 decode to infinity, NaN and -0 (to 0 with `has_minus_zero` False); the encoder never emits them. Bare powers of
    two are scales, by which is divided: those whose reciprocal is beyond float32 aren't emitted either. OCP "8-bit
    Floating Point Specification" and "Microscaling Formats" (2023).

    >>> Minifloat("fp4_e2m1", exponent=2, mantissa=1, bias=1).nearest(torch.tensor([0.25, 2.5, -99.0]))
    tensor([ 0.,  2., -6.])
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    specials: Specials = "finite"
    signed: bool = True
    has_minus_zero: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"{self.name}: a float of {self.bits} bits does not fit in a code: give 2 to 8 bits")

    @property
    def bits(self) -> int:
        return self.signed + self.exponent + self.mantissa

    @property
    def smallest(self) -> float:
        return -self.largest if self.signed else self._magnitudes[self._first]

    @property
    def largest(self) -> float:
        return self._finite[-1]

    def nearest(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x)).to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        if not self.signed:
            return nearest_index(x, self._finite).clamp_(min=self._first).to(torch.uint8)
        index = nearest_index(x.abs(), self._finite).to(torch.uint8)
        return index.add_((x < 0) & (index > 0), alpha=1 << (self.bits - 1))

    def decode(self, codes: Tensor) -> Tensor:
        return lookup(codes, self._table)

    @cached_property
    def _table(self) -> tuple[float, ...]:
        negative = tuple(-value or (-0.0 if self.has_minus_zero else 0.0) for value in self._magnitudes)
        return self._magnitudes + negative if self.signed else self._magnitudes

    @property
    def _first(self) -> int:
        """The first code that the encoder emits where there is no sign."""
        return (
            0
            if self.signed or self.mantissa
            else next(i for i, value in enumerate(self._magnitudes) if value >= 2.0**-127)
        )

    @cached_property
    def _magnitudes(self) -> tuple[float, ...]:
        """The value of each code without a sign bit."""
        return tuple(self._value(code) for code in range(1 << (self.exponent + self.mantissa)))

    @cached_property
    def _finite(self) -> tuple[float, ...]:
        return tuple(value for value in self._magnitudes if value < float("inf"))

    def _value(self, code: int) -> float:
        e, f = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        if e == (1 << self.exponent) - 1:
            if self.specials == "ieee":
                return float("nan") if f else float("inf")
            if self.specials == "fn" and f == (1 << self.mantissa) - 1:
                return float("nan")
        if self.mantissa == 0:
            return math.ldexp(1.0, e - self.bias)
        return math.ldexp(f + ((e > 0) << self.mantissa), max(e, 1) - self.bias - self.mantissa)


FP4_E2M1 = Minifloat("fp4_e2m1", exponent=2, mantissa=1, bias=1)
FP8_E4M3 = Minifloat("fp8_e4m3", exponent=4, mantissa=3, bias=7, specials="fn")
FP8_E5M2 = Minifloat("fp8_e5m2", exponent=5, mantissa=2, bias=15, specials="ieee")
# Powers of two from 2**-127, for scales; without a sign and without a zero. Code 255 is NaN.
E8M0 = Minifloat("e8m0", exponent=8, mantissa=0, bias=127, specials="fn", signed=False)
# How ggml reads MXFP4: twice the values, without -0, and half the scales, all 256 of them numbers.
FP4_E2M1_DOUBLED = Minifloat("fp4_e2m1_doubled", exponent=2, mantissa=1, bias=0, has_minus_zero=False)
E8M0_HALVED = Minifloat("e8m0_halved", exponent=8, mantissa=0, bias=128, signed=False)

PROVIDES: tuple[NumberFormat, ...] = (FP4_E2M1, FP8_E4M3, FP8_E5M2, E8M0, FP4_E2M1_DOUBLED, E8M0_HALVED)
