"""The sum of many numbers without any rounding, so that it does not depend on their order or grouping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# float32 numbers are multiples of 2**-149, and their squares of this.
SMALLEST_BITS = 298
_ONE = 1 << SMALLEST_BITS
# Sums of float64 numbers are exact while they are multiples of one step and stay below 2**52 steps.
_EXACT_BITS = 52


def exact_sum_(x: Tensor, spare: Tensor, *, peak: float) -> int:
    """sum of `x` in units of 2**-298; `x` float64 [n], multiples of that unit, |x| <= `peak`.

    `x` and `spare`, float64 [n], are used up.

    Each number is cut into slices, the highest first: the multiples of a step so coarse that their sum is exact in
    float64, whatever its order (error-free vector transformation: Rump, Ogita and Oishi, 2008).

    >>> x = torch.tensor([1.0, 2.0**-149, -1.0], dtype=torch.float64)
    >>> exact_sum_(x, torch.empty_like(x), peak=1.0) == 2 ** (298 - 149)
    True
    """
    total = 0
    while peak > 0:
        step = math.frexp(peak)[1] + x.numel().bit_length() - _EXACT_BITS
        # x + c has no bits below the step, which rounds x to a multiple of it.
        c = 1.5 * 2.0 ** (step + _EXACT_BITS)
        torch.add(x, c, out=spare).sub_(c)
        total += whole(spare.sum().item())
        x.sub_(spare)
        # What is left is at most half a step. Its squares don't underflow: they are multiples of 2**-596.
        peak = 2.0 ** (step - 1) if torch.dot(x, x).item() else 0.0
    return total


def whole(x: float) -> int:
    """`x` in units of 2**-298, of which it must be a multiple."""
    numerator, denominator = x.as_integer_ratio()
    return numerator * (_ONE // denominator)


def real(total: int) -> float:
    """`total` units of 2**-298, rounded once."""
    return total / _ONE
