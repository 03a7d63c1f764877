"""Small floats with scales beside them: DeepSeek-V3, Qwen3-FP8 and what else says `quant_method: fp8`.

    weight[i, j] = value(code[i, j]) * scale[i // rows, j // columns]        in float32, rounded to the model's type

with blocks of rows x columns (`weight_block_size`, 128 x 128), the last ones cut off at the edge; one scale per row
or per tensor is the same with larger blocks. https://github.com/deepseek-ai/DeepSeek-V3 (inference/kernel.py),
transformers' integrations/finegrained_fp8.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.models.checkpoint import row_range
from pennyweight.models.decoders.base import Decoder, Decoding, Virtual, by_rows, companions

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
# Scales of activations and of the attention cache, which the weights are decoded without.
_UNUSED = ("activation_scale", "input_scale", "input_scale_inv", "output_scale", "k_scale", "v_scale")


@dataclass(frozen=True)
class _Weight:
    """One stored weight: [..., out, in] in blocks of `rows` x `columns` that share a scale."""

    checkpoint: Checkpoint
    name: str
    scale: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    rows: int
    columns: int
    dtype: torch.dtype

    def read(self, part: slice | None) -> Tensor:
        first, last = row_range(self.name, self.shape, part or slice(None))
        codes = self.checkpoint.read(self.name, slice(first, last))
        scales = _as_float(self.checkpoint.read(self.scale)).reshape(self.grid)
        if len(self.shape) == 2:
            return self._decode(codes, scales, first=first)
        matrices = [self._decode(codes[i], scales[first + i], first=0) for i in range(last - first)]
        return torch.stack(matrices) if matrices else torch.empty(codes.shape, dtype=self.dtype)

    def _decode(self, codes: Tensor, scales: Tensor, *, first: int) -> Tensor:
        """codes [n, in], the rows from `first` on of a matrix with scales float32 [row blocks, column blocks]."""
        block_of_row = torch.arange(first, first + codes.shape[0]) // self.rows
        block_of_column = torch.arange(codes.shape[1]) // self.columns

        def decode(rows: slice) -> Tensor:
            scale = scales.index_select(0, block_of_row[rows]).index_select(1, block_of_column)
            return codes[rows].float().mul_(scale).to(self.dtype)

        return by_rows((codes.shape[0], codes.shape[1]), self.dtype, decode)


def _as_float(scales: Tensor) -> Tensor:
    # Bytes are exponents, 2**(byte - 127), stored without their type e8m0.
    return (scales.float() - 127).exp2_() if scales.dtype == torch.uint8 else scales.float()


@dataclass(frozen=True)
class Fp8:
    """`quant_method: fp8`."""

    name: str = "fp8"

    def open(self, checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: torch.dtype | None) -> Decoding:
        tensors: dict[str, Virtual] = {}
        consumed: set[str] = set()
        kinds: set[str] = set()
        for name, info in checkpoint.tensors.items():
            scale = _scale_of(checkpoint, name, info)
            if scale is None:
                continue
            weight = _weight(checkpoint, name, scale, settings=settings, dtype=dtype)
            tensors[name] = Virtual(TensorInfo(weight.dtype, weight.shape), weight.read)
            consumed |= {name, scale, *companions(checkpoint, name.removesuffix("weight"), _UNUSED)}
            kinds.add(_kind(weight, settings.get("weight_block_size")))
        return Decoding(f"fp8 weights with {' and '.join(sorted(kinds))}", tensors, frozenset(consumed))


def _scale_of(checkpoint: Checkpoint, name: str, info: TensorInfo) -> str | None:
    """The name of the scales of the weight `name`; None for a tensor that is not quantized."""
    candidates = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(".weight"):
        candidates.append(name.removesuffix("weight") + "scale")
    if info.dtype in _FP8:
        for candidate in candidates:
            if candidate in checkpoint.tensors:
                return candidate
        raise CheckpointError(
            f"{checkpoint.path}: {name!r} is stored in fp8 without scales; looked for {', '.join(candidates)}. "
            "The checkpoint is incomplete: download it again."
        )
    if info.dtype in (torch.int8, torch.uint8) and any(candidate in checkpoint.tensors for candidate in candidates):
        raise CheckpointError(
            f"{checkpoint.path}: {name!r} is {info.dtype}, known in an fp8 checkpoint are F8_E4M3 and F8_E5M2 (packed "
            "4-bit experts are not read). Give the original model, or save it dequantized."
        )
    return None


def _weight(
    checkpoint: Checkpoint, name: str, scale: str, *, settings: Mapping[str, Any], dtype: torch.dtype | None
) -> _Weight:
    shape, stored = checkpoint.tensors[name].shape, checkpoint.tensors[scale]
    if len(shape) not in (2, 3) or stored.dtype not in _SCALES:
        raise CheckpointError(
            f"{checkpoint.path}: {name!r} {list(shape)} with scales {scale!r} of {stored.dtype} cannot be decoded; "
            "known are matrices and stacks of matrices with float scales. Give the original model."
        )
    grid = _grid(shape, stored.shape)
    block = None if grid is None else _block(shape[-2:], grid[-2:], settings.get("weight_block_size"))
    if grid is None or block is None:
        raise CheckpointError(
            f"{checkpoint.path}: {scale!r} {list(stored.shape)} does not fit the weight {name!r} {list(shape)}: "
            f"expected a scale per block of {settings.get('weight_block_size')}, per row or one. Download it again."
        )
    own = torch.bfloat16 if stored.dtype.itemsize == 1 else stored.dtype
    return _Weight(checkpoint, name, scale, shape, grid, *block, dtype or own)


def _grid(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the scales with as many axes as the weight: [experts,] row blocks, column blocks."""
    if math.prod(scales) == 1:
        scales = (1,) * (len(shape) - 2)
    full = (*scales, *(1 for _ in range(len(shape) - len(scales))))
    if len(full) != len(shape):
        return None
    if len(shape) == 3 and full[0] != shape[0]:
        return None
    return full


def _block(shape: tuple[int, ...], grid: tuple[int, ...], configured: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale; the config's where they give this grid, else what divides evenly."""
    if _is_pair(configured) and all(g == math.ceil(n / b) for n, g, b in zip(shape, grid, configured, strict=True)):
        return configured[0], configured[1]
    if any(g < 1 or n % g for n, g in zip(shape, grid, strict=True)):
        return None
    return max(1, shape[0] // grid[0]), max(1, shape[1] // grid[1])


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(item) is int and item > 0 for item in value)


def _kind(weight: _Weight, configured: Any) -> str:
    if not (_is_pair(configured) and (weight.rows, weight.columns) == tuple(configured)):
        if weight.grid[-2:] == (1, 1):
            return "one scale per tensor"
        if weight.rows == 1 and weight.grid[-1] == 1:
            return "one scale per channel"
    return f"{weight.rows}x{weight.columns} block scales"


PROVIDES: tuple[Decoder, ...] = (Fp8(),)
