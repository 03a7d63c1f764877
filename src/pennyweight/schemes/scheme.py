"""The Scheme: a number format, what shares a scale, and how scales, zero points and offsets are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from pennyweight.core.errors import ShapeError, UsageError
from pennyweight.formats import NumberFormat
from pennyweight.formats.integer import Int
from pennyweight.schemes.storage import FLOATS, Granularity, PerChannel, PerGroup, PerTensor, ScaleSpec, ZeroSpec

# How names write the float types.
SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "model": "model"}
# Names that have become words of their own, and what they stand for.
WORDS = {
    "mxfp4": "fp4_e2m1-g32-e8m0",
    "mxfp8": "fp8_e4m3-g32-e8m0",
    "nvfp4": "fp4_e2m1-g16-fp8_e4m3.f32",
    # The block types of GGUF, which ggml decodes in float32.
    "q8_0": "int8-g32-f16-f32",
    "q4_0": "int4-g32-f16-f32",
    "q4_1": "uint4-g32-offset-f16",
    "q5_0": "int5-g32-f16-f32",
    "q5_1": "uint5-g32-offset-f16",
    "q2_k": "uint2-g16-offset-uint4x16.f16",
    "q3_k": "int3-g16-int6x16.f16",
    "q4_k": "uint4-g32-offset-uint6x8.f16",
    "q5_k": "uint5-g32-offset-uint6x8.f16",
    "q6_k": "int6-g16-int8x16.f16",
    "iq4_nl": "iq4_nl-g32-f16-f32",
    "iq4_xs": "iq4_nl-g32-int6x8.f16",
    "mxfp4_ggml": "fp4_e2m1_doubled-g32-e8m0_halved",
    "tq2_0": "ternary-g256-f16-f32",
}

_MODEL = ScaleSpec()


@dataclass(frozen=True)
class Scheme:
    """weight = scale * (value(code) - zero) or scale * value(code) - offset; symmetric with neither.

    Two schemes are equal when they store the same bits and decode them alike. `computed` names the float type in which
    a reader computes weights; None: the usual one, see `arithmetic`. `name` prints the short name that `parse_scheme`
    reads.
    """

    element: NumberFormat
    granularity: Granularity
    scale: ScaleSpec = _MODEL
    zero: ZeroSpec | None = None
    offset: ScaleSpec | None = None
    computed: str | None = None

    def __post_init__(self) -> None:
        if self.computed not in (None, *FLOATS):
            raise UsageError(f"weights are not computed in {self.computed}: use {', '.join(FLOATS)}, or leave it out")
        if self.computed == self._usual:
            # The usual type goes without saying, so that equal schemes are equal.
            object.__setattr__(self, "computed", None)
        if self.zero is not None and self.offset is not None:
            raise UsageError("a scheme has a zero point, an offset or neither, not both: drop one of them")
        if self.element.smallest > 0:
            raise UsageError(f"{self.element.name} holds scales only: it has neither a zero nor numbers below it")
        if self.has_integer_zero and not isinstance(self.element, Int):
            raise UsageError(
                f"{self.element.name} has no integer zero points: use a float one (-fzero), an offset (-offset) or none"
            )

    @property
    def has_integer_zero(self) -> bool:
        return self.zero is not None and self.zero.dtype == "integer"

    @property
    def is_plain(self) -> bool:
        """Float scales with no zero point or an integer one: what every integer runtime has."""
        return self.scale.element is None and self.offset is None and (self.zero is None or self.has_integer_zero)

    @property
    def arithmetic(self) -> torch.dtype:
        """The type in which a reader computes weights: `computed`, or else that of plain scales, or else float32."""
        if self.computed is not None:
            return FLOATS[self.computed]
        return self.scale.torch_dtype if self.is_plain else torch.float32

    @property
    def _usual(self) -> str:
        return self.scale.dtype if self.is_plain else "float32"

    @property
    def rows_share(self) -> bool:
        """Whether something is stored once for the whole weight, so that rows cannot be quantized by themselves."""
        nested = (spec for spec in (self.scale, self.offset) if spec is not None and spec.parent is not None)
        return isinstance(self.granularity, PerTensor) or any(spec.span is None for spec in nested)

    @cached_property
    def name(self) -> str:
        return _name(self)

    def __str__(self) -> str:
        return self.name

    def with_scale_dtype(self, dtype: torch.dtype) -> Scheme:
        """The same scheme with `dtype` for whatever was left to the model's type."""
        names = {kind: name for name, kind in FLOATS.items()}
        zero = self.zero
        specs = [spec for spec in (self.scale, self.offset) if spec is not None]
        if (zero is None or zero.dtype != "model") and all(spec == spec.with_dtype("float32") for spec in specs):
            return self
        if dtype not in names:
            raise UsageError(f"scales can be stored as float16, bfloat16 or float32, not as {dtype}")
        fixed = names[dtype]
        return replace(
            self,
            scale=self.scale.with_dtype(fixed),
            zero=ZeroSpec(fixed) if zero is not None and zero.dtype == "model" else zero,
            offset=None if self.offset is None else self.offset.with_dtype(fixed),
        )

    def with_granularity(self, granularity: Granularity) -> Scheme:
        return replace(self, granularity=granularity)

    def group_size(self, inputs: int) -> int:
        """Weights per scale along the input axis of a weight with `inputs` columns."""
        if not isinstance(self.granularity, PerGroup):
            return inputs
        if inputs % self.granularity.size:
            raise ShapeError(
                f"{inputs} inputs cannot be split into groups of {self.granularity.size}: "
                f"use a group size that divides {inputs}, or one scale per channel"
            )
        return self.granularity.size

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """[rows, groups] of the scales (and zeros, offsets) of a weight of `shape` [out, in]; [1, 1] per tensor."""
        if len(shape) != 2:
            raise ShapeError(f"a weight of shape {tuple(shape)} cannot be quantized: give a matrix [out, in]")
        if isinstance(self.granularity, PerTensor):
            return (1, 1)
        groups = shape[1] // self.group_size(shape[1]) if shape[1] else 0
        return (shape[0], groups)

    def storage_bits(self, shape: tuple[int, ...]) -> int:
        """Bits that hold a weight of `shape` [out, in]: its codes, scales, zero points or offsets, and their parents,
        without any padding."""
        scales = self.scale_shape(shape)
        bits = shape[0] * shape[1] * self.element.bits + self.scale.storage_bits(scales)
        if self.zero is not None:
            each = self.element.bits if self.has_integer_zero else 8 * self.zero.torch_dtype.itemsize
            bits += scales[0] * scales[1] * each
        return bits if self.offset is None else bits + self.offset.storage_bits(scales)


def _name(scheme: Scheme) -> str:
    """The short name that `parse_scheme` reads; its shortest form."""
    match scheme.granularity:
        case PerTensor():
            shared = "tensor"
        case PerChannel():
            shared = "channel"
        case PerGroup(size):
            shared = f"g{size}"
    parts = [scheme.element.name, shared]
    if scheme.has_integer_zero:
        parts.append("asym")
    elif scheme.zero is not None:
        parts.append("fzero" if scheme.zero.dtype == scheme.scale.root else f"fzero={SHORT[scheme.zero.dtype]}")
    elif scheme.offset is not None:
        parts.append("offset" if scheme.offset == scheme.scale else f"offset={_spec_name(scheme.offset)}")
    if scheme.scale != _MODEL or scheme.computed is not None:
        parts.append(_spec_name(scheme.scale))
    if scheme.computed is not None:
        parts.append(SHORT[scheme.computed])
    text = "-".join(parts)
    return next((word for word, meaning in WORDS.items() if meaning == text), text)


def _spec_name(spec: ScaleSpec) -> str:
    span = "" if spec.span is None else f"x{spec.span}"
    parent = "" if spec.parent is None else f".{SHORT[spec.parent.dtype]}"
    return f"{SHORT.get(spec.dtype, spec.dtype)}{span}{parent}"
