"""Rounding of fitted scales, zero points and offsets to what a scheme can store, before any code is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.schemes.scheme import Scheme
from pennyweight.schemes.storage import ScaleSpec


@dataclass(frozen=True)
class Stored:
    """Where numbers [rows, groups, 1] are stored: floats, or codes with `parents` float32 that broadcast over them.

    `limit` bounds their magnitude, so that what is computed with them stays finite. `is_unsigned` keeps floats that
    stand for codes without a sign from going below zero.
    """

    spec: ScaleSpec
    limit: float
    parents: Tensor | None = None
    is_unsigned: bool = False

    def nearest(self, x: Tensor) -> Tensor:
        """float32: the nearest number that can be stored."""
        bounded = x.clamp(0 if self.is_unsigned else -self.limit, self.limit)
        element = self.spec.element
        if element is None:
            return bounded.to(self.spec.torch_dtype).float()
        if self.parents is None:
            return element.nearest(bounded)
        return element.nearest(bounded / self.parents) * self.parents

    def nonzero(self, x: Tensor) -> Tensor:
        """The same without 0, which becomes the smallest positive number: divisions by a scale stay finite."""
        rounded = self.nearest(x)
        return torch.where(rounded == 0, self.smallest, rounded)

    def encode(self, x: Tensor) -> Tensor:
        """The stored form of what `nearest` gave."""
        element = self.spec.element
        if element is None:
            return x.to(self.spec.torch_dtype)
        return element.encode(x if self.parents is None else x / self.parents)

    def rows(self, part: slice) -> Stored:
        is_shared = self.parents is None or self.parents.shape[0] == 1
        return self if is_shared else replace(self, parents=self.parents[part])  # type: ignore[index]

    @property
    def is_signed(self) -> bool:
        return not self.is_unsigned and (self.spec.element is None or self.spec.element.smallest < 0)

    @property
    def smallest(self) -> Tensor:
        """The smallest positive number: a normal one of a float type."""
        element = self.spec.element
        if element is None:
            return torch.tensor(torch.finfo(self.spec.torch_dtype).smallest_normal)
        values = element.decode(torch.arange(2**element.bits, dtype=torch.uint8))
        least = values[(values > 0) & values.isfinite()].amin()
        return least if self.parents is None else least * self.parents


def stored_scales(scheme: Scheme, *, reach: float | None = None) -> Stored:
    """Scales, without parents yet: `reach` times them, by default the largest |value - zero|, stays finite."""
    limit = torch.finfo(scheme.arithmetic).max / (1 + spread_of(scheme) if reach is None else reach)
    own = limit if scheme.scale.element is not None else torch.finfo(scheme.scale.torch_dtype).max
    return Stored(scheme.scale, min(limit, own))


def stored_shifts(scheme: Scheme) -> Stored | None:
    """Zero points or offsets that are no integers, without parents yet; None where the scheme has none."""
    if scheme.offset is not None:
        kind = scheme.offset.torch_dtype if scheme.offset.element is None else torch.float32
        return Stored(scheme.offset, torch.finfo(kind).max / 4)
    if scheme.zero is None or scheme.has_integer_zero:
        return None
    return Stored(ScaleSpec(scheme.zero.dtype), torch.finfo(scheme.zero.torch_dtype).max / 4)


def spread_of(scheme: Scheme) -> float:
    """From the smallest value of the number format to the largest."""
    return scheme.element.largest - scheme.element.smallest


def parents_of(numbers: Tensor, spec: ScaleSpec) -> Tensor:
    """Parents [rows, parents] in their stored type, for `numbers` float32 [rows, groups].

    The largest magnitude of a span gets the largest code. One parent for the whole weight is rounded up to a power of
    two: readers that divide by its reciprocal and readers that multiply then decode alike, and small floats lose
    nothing by it.
    """
    assert spec.parent is not None
    assert spec.element is not None
    largest = spec.element.largest
    if spec.span is None:
        fraction, exponent = torch.frexp(numbers.abs().amax().reshape(1, 1) / largest)
        wanted = torch.ldexp(torch.ones_like(fraction), torch.where(fraction == 0.5, exponent - 1, exponent))
    else:
        wanted = numbers.abs().reshape(numbers.shape[0], -1, spec.span).amax(-1) / largest
    return torch.where(wanted == 0, 1.0, rounded_parents(wanted, spec).float()).to(spec.parent.torch_dtype)


def rounded_parents(wanted: Tensor, spec: ScaleSpec) -> Tensor:
    """The nearest parents of their stored type: finite with every code, and never 0."""
    assert spec.parent is not None
    assert spec.element is not None
    kind = spec.parent.torch_dtype
    bounds = torch.finfo(kind)
    limit = min(bounds.max, torch.finfo(torch.float32).max / spec.element.largest)
    rounded = wanted.clamp(-limit, limit).to(kind)
    return torch.where(rounded == 0, bounds.smallest_normal, rounded).to(kind)
