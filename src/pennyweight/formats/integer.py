"""Integers of 2 to 8 bits, signed (two's complement range) and unsigned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import UsageError
from pennyweight.formats.base import NumberFormat


@dataclass(frozen=True)
class Int:
    """Integers of `bits` bits: value = code - 2**(bits-1) when signed, value = code otherwise.

    >>> Int(4).decode(Int(4).encode(torch.tensor([1.5, 2.5, 99.0])))   # ties to even, saturates
    tensor([2., 2., 7.])
    """

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"an integer format of {self.bits} bits does not exist here: give 2 to 8")

    @property
    def name(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def smallest(self) -> float:
        return -(2.0 ** (self.bits - 1)) if self.signed else 0.0

    @property
    def largest(self) -> float:
        return self.smallest + 2.0**self.bits - 1

    def nearest(self, x: Tensor) -> Tensor:
        """The value of the format that is nearest to each element, in the type of `x`: ties to even, saturating."""
        return x.round().clamp_(self.smallest, self.largest)

    def encode(self, x: Tensor) -> Tensor:
        # Added before the cast: a negative float cast to an unsigned type is undefined.
        return self.nearest(x).sub_(self.smallest).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float().add_(self.smallest)


PROVIDES: tuple[NumberFormat, ...] = tuple(Int(bits, signed) for bits in range(2, 9) for signed in (True, False))
