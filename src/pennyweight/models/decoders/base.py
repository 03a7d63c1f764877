"""What a decoder is, and what decoders share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.formats.integer import Int
from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.schemes import PerGroup, QuantizedWeight, ScaleSpec, Scheme, ZeroSpec

# Rows decoded at a time by one thread: the float32 temporaries stay a few megabytes.
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Coded:
    """A weight as it is stored: its scheme, and what reads its codes."""

    scheme: Scheme
    read: Callable[[], QuantizedWeight]


def _no_codes() -> None:
    return None


@dataclass(frozen=True)
class Virtual:
    """A tensor that is decoded when it is read; `read` gives rows `part` of its first axis, all for None; `coded` how
    it is stored, None where that is no scheme."""

    info: TensorInfo
    read: Callable[[slice | None], Tensor]
    coded: Callable[[], Coded | None] = _no_codes


@dataclass(frozen=True)
class Decoding:
    """What a decoder made of a checkpoint.

    description   what was decoded: "fp8 weights with 128x128 block scales"
    tensors       the decoded tensors by name
    consumed      the stored tensors that they replace
    """

    description: str
    tensors: Mapping[str, Virtual]
    consumed: frozenset[str]


class Decoder(Protocol):
    """One way of storing quantized weights; `name` is the `quant_method` of the config.

    `open` reads shapes and small tensors only. `dtype` is the model's type, or None where its config has none: then
    the scales' type. Raises CheckpointError that names the tensor, also where `settings` are of an unknown variant.
    """

    @property
    def name(self) -> str: ...
    def open(self, checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: torch.dtype | None) -> Decoding: ...


def component(checkpoint: Checkpoint, name: str, *, of: str) -> TensorInfo:
    """Type and shape of the stored tensor `name`, which `of` cannot be decoded without."""
    if name not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.path}: {of!r} cannot be decoded without {name!r}, which is not there. "
            "The checkpoint is incomplete: download it again."
        )
    return checkpoint.tensors[name]


def expect(checkpoint: Checkpoint, name: str, *, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the stored tensor `name` has one of `dtypes` and `shape`."""
    info = checkpoint.tensors[name]
    if info.dtype not in dtypes or info.shape != shape:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(
            f"{checkpoint.path}: {name!r} is {str(info.dtype).removeprefix('torch.')} {list(info.shape)}, "
            f"expected {allowed} {list(shape)}. Its config does not describe it, or it is of an unknown variant."
        )


def by_rows(shape: tuple[int, int], dtype: torch.dtype, decode: Callable[[slice], Tensor]) -> Tensor:
    """A matrix of `shape`, its rows decoded a chunk at a time; `decode` gives the rows of a slice in `dtype`."""
    out = torch.empty(shape, dtype=dtype)

    def one(rows: slice) -> None:
        out[rows] = decode(rows)

    parallel_map(one, chunks(shape[0], CHUNK_ROWS))
    return out


def affine(codes: Tensor, zeros: Tensor, scales: Tensor, *, groups: Tensor, dtype: torch.dtype) -> Tensor:
    """weight = (code - zero) * scale, in the scale's type, then `dtype`: as the GPTQ and AWQ readers evaluate it.

    codes uint8 [out, in]; zeros uint8 and scales [out, groups]; groups int64 [in], the group of each column.
    """

    def decode(rows: slice) -> Tensor:
        values = codes[rows].to(torch.int16).sub_(zeros[rows].to(torch.int16).index_select(1, groups))
        return values.to(scales.dtype).mul_(scales[rows].index_select(1, groups)).to(dtype)

    return by_rows((codes.shape[0], codes.shape[1]), dtype, decode)


def asymmetric(bits: int, scales: torch.dtype, *, size: int) -> Scheme:
    """The scheme of unsigned codes with integer zero points and scales of the type `scales` for `size` inputs each."""
    return Scheme(Int(bits, signed=False), PerGroup(size), ScaleSpec(), ZeroSpec()).with_scale_dtype(scales)


def integers(codes: Tensor, zeros: Tensor, scales: Tensor, *, scheme: Scheme) -> QuantizedWeight:
    """What `affine` is given, in a scheme of `asymmetric`."""
    return QuantizedWeight(codes, scales, zeros.to(torch.int16), scheme)


def suffixed(checkpoint: Checkpoint, suffix: str) -> list[str]:
    """The stored names that end in `suffix`, without it, in order."""
    return sorted(name.removesuffix(suffix) for name in checkpoint.tensors if name.endswith(suffix))


def companions(checkpoint: Checkpoint, base: str, suffixes: Iterable[str]) -> set[str]:
    """Those of base + suffix that are stored."""
    return {base + suffix for suffix in suffixes if base + suffix in checkpoint.tensors}
