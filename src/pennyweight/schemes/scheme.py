"""Granularity, how scales and zero points are stored, and the Scheme that puts them together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from pennyweight.core.errors import ShapeError, UsageError
from pennyweight.formats import NumberFormat

ScaleDtype = Literal["model", "float16", "bfloat16", "float32"]
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SHORT = {"float16": "-f16", "bfloat16": "-bf16", "float32": "-f32", "model": ""}


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
    """The type in which scales are stored; "model" stands for the type of the checkpoint until a plan is made."""

    dtype: ScaleDtype = "model"

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "model":
            raise UsageError("the scheme's scales have the model's type: fix it with Scheme.with_scale_dtype first")
        return _DTYPES[self.dtype]

    @property
    def bits(self) -> int:
        return self.torch_dtype.itemsize * 8


@dataclass(frozen=True)
class ZeroSpec:
    """Integer zero points in the value domain of the number format, stored in as many bits as a code."""


@dataclass(frozen=True)
class Scheme:
    """weight = scale * (value(code) - zero), with `zero` 0 where the scheme has none (symmetric).

    Two schemes are equal when they store the same bits. `name` prints the short name that `parse_scheme` reads.
    """

    element: NumberFormat
    granularity: Granularity
    scale: ScaleSpec = ScaleSpec()
    zero: ZeroSpec | None = None

    @property
    def name(self) -> str:
        match self.granularity:
            case PerTensor():
                shared = "tensor"
            case PerChannel():
                shared = "channel"
            case PerGroup(size):
                shared = f"g{size}"
        return f"{self.element.name}-{shared}{'-asym' if self.zero else ''}{_SHORT[self.scale.dtype]}"

    def __str__(self) -> str:
        return self.name

    def with_scale_dtype(self, dtype: torch.dtype) -> Scheme:
        """The same scheme with its scales stored as `dtype`, if it was left to the model; else unchanged."""
        if self.scale.dtype != "model":
            return self
        names: dict[torch.dtype, ScaleDtype] = {
            torch.float16: "float16",
            torch.bfloat16: "bfloat16",
            torch.float32: "float32",
        }
        if dtype not in names:
            raise UsageError(f"scales can be stored as float16, bfloat16 or float32, not as {dtype}")
        return replace(self, scale=ScaleSpec(names[dtype]))

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
        """[rows, groups] of the scales (and zeros) of a weight of `shape` [out, in]; [1, 1] per tensor."""
        if len(shape) != 2:
            raise ShapeError(f"a weight of shape {tuple(shape)} cannot be quantized: give a matrix [out, in]")
        if isinstance(self.granularity, PerTensor):
            return (1, 1)
        groups = shape[1] // self.group_size(shape[1]) if shape[1] else 0
        return (shape[0], groups)

    def storage_bits(self, shape: tuple[int, ...]) -> int:
        """Bits that hold a weight of `shape` [out, in]: its codes, scales and zero points, without any padding."""
        rows, groups = self.scale_shape(shape)
        zero_bits = self.element.bits if self.zero else 0
        return shape[0] * shape[1] * self.element.bits + rows * groups * (self.scale.bits + zero_bits)
