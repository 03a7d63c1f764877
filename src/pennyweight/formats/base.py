"""What a number format is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class NumberFormat(Protocol):
    """Values <-> codes. A code is the unsigned index in the format's table of 2**bits values.

    `encode` takes any float tensor and gives uint8 codes: nearest value, ties to even, saturating (NaN is the
    caller's error). `decode` takes uint8 codes below 2**bits and gives float32 values, those that no encoder emits
    included; some of these may be infinite or NaN. `smallest` and `largest` are the ends of what `encode` emits.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def smallest(self) -> float: ...
    @property
    def largest(self) -> float: ...
    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...
    def nearest(self, x: Tensor) -> Tensor: ...
    def __hash__(self) -> int: ...
