"""What shares a scale, and how scales, zero points and offsets are stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pennyweight.core.errors import ShapeError, UsageError
from pennyweight.formats import NumberFormat, number_format

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole weight."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output row."""


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` weights along the input axis of each row."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"a group of {self.size} weights does not exist: give a group size of at least 1")


Granularity = PerTensor | PerChannel | PerGroup


@dataclass(frozen=True)
class ScaleSpec:
    """How scales (or offsets) are stored.

    dtype    "float16", "bfloat16", "float32"; "model": the type of the checkpoint, until a plan is made; or the name of
             a number format: scales are codes then
    parent   for codes only: scale = value(code) * parent, the parent a float by itself
    span     how many consecutive scales of a row share a parent; None: one parent for the whole weight

    MXFP4 has ScaleSpec("e8m0"), NVFP4 ScaleSpec("fp8_e4m3", ScaleSpec("float32")), Q4_K of GGUF
    ScaleSpec("uint6", ScaleSpec("float16"), 8).
    """

    dtype: str = "model"
    parent: ScaleSpec | None = None
    span: int | None = None

    def __post_init__(self) -> None:
        is_float = self.dtype in ("model", *FLOATS)
        if not is_float:
            number_format(self.dtype)
        if self.parent is not None and (is_float or self.parent.dtype not in ("model", *FLOATS)):
            raise UsageError(
                f"scales of type {self.dtype} with parents of type {self.parent.dtype} do not exist: "
                "only scales that are codes have parents, and these are floats"
            )
        if self.span is not None and (self.parent is None or self.span < 1):
            raise UsageError(
                f"{self.span} scales of type {self.dtype} cannot share a parent: give a parent and 1 or more"
            )

    @property
    def element(self) -> NumberFormat | None:
        """The number format of scales that are stored as codes."""
        return None if self.dtype in ("model", *FLOATS) else number_format(self.dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the tensor that holds the scales; uint8 where they are codes."""
        if self.dtype == "model":
            raise UsageError("the scheme's scales have the model's type: fix it with Scheme.with_scale_dtype first")
        return FLOATS.get(self.dtype, torch.uint8)

    @property
    def bits(self) -> int:
        """Bits of one scale, without its parent."""
        return self.torch_dtype.itemsize * 8 if self.element is None else self.element.bits

    @property
    def root(self) -> str:
        """The float type that scales go back to: their own, that of their parents, or else "model"."""
        if self.parent is not None:
            return self.parent.dtype
        return self.dtype if self.element is None else "model"

    def parent_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """[rows, parents] for scales of `shape` [rows, groups]; raises ShapeError where spans do not come out even."""
        if self.span is None:
            return (1, 1)
        if shape[1] % self.span:
            raise ShapeError(
                f"{shape[1]} scales in a row cannot share parents by {self.span}: "
                f"the row must have a multiple of {self.span} groups"
            )
        return (shape[0], shape[1] // self.span)

    def storage_bits(self, shape: tuple[int, int]) -> int:
        """Bits of scales of `shape` [rows, groups] with their parents."""
        own = shape[0] * shape[1] * self.bits
        if self.parent is None:
            return own
        rows, parents = self.parent_shape(shape)
        return own + rows * parents * self.parent.bits

    def with_dtype(self, dtype: str) -> ScaleSpec:
        """The same with `dtype` wherever it was left to the model."""
        if self.parent is not None:
            return replace(self, parent=self.parent.with_dtype(dtype))
        return replace(self, dtype=dtype) if self.dtype == "model" else self


@dataclass(frozen=True)
class ZeroSpec:
    """Zero points in the value domain of the number format.

    "integer": values of the number format, stored in as many bits as a code; else floats of that type ("model": the
    checkpoint's), anywhere.
    """

    dtype: str = "integer"

    def __post_init__(self) -> None:
        if self.dtype not in ("integer", "model", *FLOATS):
            raise UsageError(
                f"zero points of type {self.dtype} do not exist: use integer, {', '.join(FLOATS)} or model"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the tensor that holds the zero points; int16 for integers."""
        if self.dtype == "model":
            raise UsageError(
                "the scheme's zero points have the model's type: fix it with Scheme.with_scale_dtype first"
            )
        return FLOATS.get(self.dtype, torch.int16)
