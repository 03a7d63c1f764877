"""What a scheme stores beside codes: scales, zero points or offsets, and the parents of those that are codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.schemes.scheme import Scheme
from pennyweight.schemes.storage import PerTensor, ScaleSpec


@dataclass(frozen=True)
class Decoded:
    """float32 scales, and zeros or offsets or neither, each [rows, groups] (see Scheme.scale_shape)."""

    scales: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None


@dataclass(frozen=True)
class Parameters:
    """The stored form; [rows, groups] is Scheme.scale_shape, [rows, parents] ScaleSpec.parent_shape.

    scales           [rows, groups] of the float type, or uint8 codes of the number format of the scheme's scales
    zeros            int16 [rows, groups], values of the number format, or floats; None where the scheme has none
    offsets          like scales, for the scheme's offset
    parents          [rows, parents], floats, where the scales are codes with parents
    offset_parents   the same for offsets
    """

    scales: Tensor
    zeros: Tensor | None = None
    offsets: Tensor | None = None
    parents: Tensor | None = None
    offset_parents: Tensor | None = None

    def check(self, scheme: Scheme, shape: tuple[int, ...]) -> None:
        """Raises ShapeError where these are not what `scheme` stores for a weight of `shape` [out, in]."""
        expected = scheme.scale_shape(shape)
        kind = scheme.scale.torch_dtype
        if tuple(self.scales.shape) != expected or self.scales.dtype != kind:
            raise ShapeError(
                f"{scheme}: scales {tuple(self.scales.shape)} {self.scales.dtype}, expected {expected} {kind}"
            )
        _check(self.zeros, f"{scheme}: zero points", None if scheme.zero is None else (expected, None))
        _check(self.offsets, f"{scheme}: offsets", _stored(scheme.offset, expected))
        _check(self.parents, f"{scheme}: parents of scales", _parents(scheme.scale, expected))
        _check(self.offset_parents, f"{scheme}: parents of offsets", _parents(scheme.offset, expected))

    def decoded(self, scheme: Scheme) -> Decoded:
        """Scales, zeros and offsets in float32."""
        offsets = None
        if scheme.offset is not None and self.offsets is not None:
            offsets = _decode(self.offsets, self.offset_parents, scheme.offset)
        zeros = None if self.zeros is None else self.zeros.float()
        return Decoded(_decode(self.scales, self.parents, scheme.scale), zeros, offsets)

    def rows(self, index: Tensor | slice, scheme: Scheme) -> Parameters:
        """Those of some rows of the weight; what is stored once for all rows stays."""
        is_single = isinstance(scheme.granularity, PerTensor)

        def taken(tensor: Tensor | None, spec: ScaleSpec | None = None) -> Tensor | None:
            is_shared = is_single or (spec is not None and spec.span is None)
            return tensor if tensor is None or is_shared else tensor[index]

        return Parameters(
            scales=self.scales if is_single else self.scales[index],
            zeros=taken(self.zeros),
            offsets=taken(self.offsets),
            parents=taken(self.parents, scheme.scale),
            offset_parents=taken(self.offset_parents, scheme.offset),
        )

    @staticmethod
    def combined(parts: Sequence[Parameters], combine: Callable[[list[Tensor]], Tensor]) -> Parameters:
        """`combine` of each tensor that `parts` have, all of them the same ones."""

        def one(name: str) -> Tensor | None:
            tensors = [tensor for part in parts if (tensor := getattr(part, name)) is not None]
            return combine(tensors) if tensors else None

        return Parameters(*(one(field.name) for field in fields(Parameters)))  # type: ignore[arg-type]


def _decode(stored: Tensor, parents: Tensor | None, spec: ScaleSpec) -> Tensor:
    """value(code) * parent in float32, or the float itself."""
    own = stored.float() if spec.element is None else spec.element.decode(stored)
    return own if parents is None else own * spread(parents.float(), spec)


def spread(parents: Tensor, spec: ScaleSpec) -> Tensor:
    """`parents` [rows, parents] as what broadcasts over the scales [rows, groups] that share them."""
    return parents if spec.span is None else parents.repeat_interleave(spec.span, dim=1)


def gathered(numbers: Tensor, spec: ScaleSpec) -> Tensor:
    """Sums [rows, parents] of `numbers` [rows, groups] over the scales that share a parent; `numbers` without one."""
    if spec.parent is None:
        return numbers
    if spec.span is None:
        return numbers.sum().reshape(1, 1)
    return numbers.reshape(numbers.shape[0], -1, spec.span).sum(-1)


def _stored(spec: ScaleSpec | None, shape: tuple[int, int]) -> tuple[tuple[int, int], torch.dtype] | None:
    return None if spec is None else (shape, spec.torch_dtype)


def _parents(spec: ScaleSpec | None, shape: tuple[int, int]) -> tuple[tuple[int, int], torch.dtype] | None:
    if spec is None or spec.parent is None:
        return None
    return (spec.parent_shape(shape), spec.parent.torch_dtype)


def _check(tensor: Tensor | None, what: str, expected: tuple[tuple[int, int], torch.dtype | None] | None) -> None:
    if expected is None:
        if tensor is not None:
            raise ShapeError(f"{what} must be absent")
        return
    shape, dtype = expected
    if tensor is None or tuple(tensor.shape) != shape or dtype not in {None, tensor.dtype}:
        raise ShapeError(f"{what} must be {shape}{'' if dtype is None else f' {dtype}'}")
