"""What all contestants share: what one is, and weights that are quick to make.

Run by the Python of .venvs/kernels. A contestant holds `count` distinct weights and multiplies one input with all of
them in turn, in the way in which its library runs the linears of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

# What happens to activations: rounded to 8 bits, or multiplied as they are.
Mode = Literal["int8", "float32", "bfloat16"]
THREADS = 2
# Rows that differ; they are repeated, as no kernel's time depends on values. Quantizing to some types takes minutes.
# Libraries that keep equal weights once (ONNX Runtime does) are given weights that begin with another row each.
_DISTINCT_ROWS = 128


@dataclass(frozen=True)
class Facts:
    """library: of the contestant. bits: the width it competes at. group: columns that share a scale, the finest.
    size_bytes: of one weight, scales included."""

    name: str
    library: str
    bits: int
    group: int
    mode: Mode
    size_bytes: int


class Contestant(Protocol):
    """`memory`: the bytes of all weights where they can be seen, uint8; else empty."""

    facts: Facts
    memory: Sequence[Tensor]

    def take(self, x: Tensor) -> None:
        """Make ready to multiply `x`, float32 [tokens, cols]."""

    def run(self) -> None:
        """One product with every weight."""

    def outcome(self, index: int) -> Tensor:
        """float32 [tokens, rows]: what the last run made with the weight of that index."""

    def decoded(self) -> Tensor:
        """float32 [rows, cols]: the weight, which all of them equal."""


@dataclass(frozen=True)
class Size:
    """Weights [rows, cols], `count` of them."""

    rows: int
    cols: int
    count: int

    def of_rows(self, x: Tensor, *, first: int = 0) -> Tensor:
        """A matrix of some rows, repeated to all of them from row `first` on, contiguous."""
        return (
            x.roll(-first, dims=0).repeat(-(-self.rows // x.shape[0]), *[1] * (x.dim() - 1))[: self.rows].contiguous()
        )

    def in_order(self, out: Tensor, first: int) -> Tensor:
        """A product [tokens, rows] with a weight that began with row `first`, as if it began with the first one."""
        return out.roll(first, dims=1)

    @property
    def distinct_rows(self) -> int:
        return min(_DISTINCT_ROWS, self.rows)

    def normal(self) -> Tensor:
        """float32 [distinct rows, cols] of deviation 1/sqrt(cols)."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.distinct_rows, self.cols, generator=generator) * self.cols**-0.5


@dataclass(frozen=True)
class Rounded:
    """Whole numbers [distinct rows, cols] from -2^(bits-1), and scales [distinct rows, groups]."""

    values: Tensor
    scales: Tensor
    bits: int
    group: int

    @property
    def codes(self) -> Tensor:
        """uint8, from 0."""
        return (self.values + 2 ** (self.bits - 1)).to(torch.uint8)

    def decoded(self, size: Size) -> Tensor:
        wide = self.scales.float().repeat_interleave(self.group, dim=1)
        return size.of_rows(self.values.float() * wide)


def rounded(size: Size, *, bits: int, group: int, scale: torch.dtype) -> Rounded:
    """Normal weights, rounded to nearest with a symmetric scale for each `group` columns, of the type `scale`."""
    grouped = size.normal().view(size.distinct_rows, -1, group)
    largest = 2 ** (bits - 1)
    scales = (grouped.abs().amax(-1) / (largest - 0.5)).to(scale)
    values = (grouped / scales.float()[..., None]).round().clamp(-largest, largest - 1)
    return Rounded(values.flatten(1).to(torch.int32), scales, bits, group)


def bytes_of(x: Tensor) -> Tensor:
    """The same memory as uint8, flat."""
    return x.view(torch.uint8).flatten()
