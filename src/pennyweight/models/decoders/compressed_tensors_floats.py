"""Small floats packed by compressed-tensors: fp8, MXFP8, MXFP4 and NVFP4.

    X.weight         float8_e4m3fn [out, in], and X.weight_scale
                     floats (), [1], [out] or [out, groups]; the product in their type
                     or uint8 e8m0 [out, in / 32] (MXFP8)
    X.weight_packed  uint8 [out, in / 2], two fp4_e2m1 codes a byte, the lower half first, and X.weight_scale
                     uint8 e8m0 [out, in / 32] (MXFP4)
                     or float8_e4m3fn [out, in / 16], divided by X.weight_global_scale (NVFP4)

Where scales are small floats the library gives bfloat16. What is stored says which it is; the config only targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.formats import number_format
from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.models.checkpoint import row_range
from pennyweight.models.decoders.base import Coded, by_rows, component, expect
from pennyweight.schemes import Granularity, PerChannel, PerGroup, PerTensor, QuantizedWeight, Scheme, parse_scheme

FORMATS = ("float-quantized", "mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")
PARTS = (".weight", ".weight_packed", ".weight_scale", ".weight_global_scale")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# The layouts whose scales are small floats themselves, by the number format of the weights.
_CODED_SCALES = {"fp8_e4m3": "mxfp8", "fp4_e2m1": "mxfp4"}
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class FloatLinear:
    """One weight; `product` is the type in which the library multiplies, or to which it rounds the product."""

    checkpoint: Checkpoint
    base: str
    info: TensorInfo
    product: torch.dtype

    @property
    def element(self) -> str:
        return "fp8_e4m3" if f"{self.base}.weight" in self.checkpoint.tensors else "fp4_e2m1"

    def read(self, part: slice | None) -> Tensor:
        first, last = row_range(self.base, self.info.shape, part or slice(None))
        whole = slice(first, last)
        codes = self._codes(whole)
        scales = self._scales(whole)
        values = number_format(self.element)

        def rows(chunk: slice) -> Tensor:
            own = scales if scales.shape[0] == 1 else scales[chunk]
            decoded = values.decode(codes[chunk]).reshape(-1, own.shape[1], self.info.shape[1] // own.shape[1])
            return (decoded * own[..., None]).flatten(1).to(self.product).to(self.info.dtype)

        return by_rows((last - first, self.info.shape[1]), self.info.dtype, rows)

    def coded(self) -> Coded:
        return Coded(self._scheme, self._weight)

    @property
    def _scheme(self) -> Scheme:
        stored = self.checkpoint.tensors[f"{self.base}.weight_scale"]
        if f"{self.base}.weight_global_scale" in self.checkpoint.tensors:
            return parse_scheme("nvfp4")
        if stored.dtype == torch.uint8:
            return parse_scheme(_CODED_SCALES[self.element])
        shared: Granularity = PerChannel()
        if stored.shape in ((), (1,)):
            shared = PerTensor()
        elif len(stored.shape) == 2 and stored.shape[1] > 1:
            shared = PerGroup(self.info.shape[1] // stored.shape[1])
        return Scheme(number_format(self.element), shared).with_scale_dtype(stored.dtype)

    def _weight(self) -> QuantizedWeight:
        scheme, parents = self._scheme, None
        scales = self.checkpoint.read(f"{self.base}.weight_scale")
        if scheme.scale.parent is not None:
            parents = self.checkpoint.read(f"{self.base}.weight_global_scale").reciprocal().reshape(1, 1)
        scales = scales if scheme.scale.element is None else scales.view(torch.uint8)
        codes = self._codes(slice(0, self.info.shape[0]))
        return QuantizedWeight(
            codes, scales.reshape(scheme.scale_shape(self.info.shape)), None, scheme, parents=parents
        )

    def _codes(self, rows: slice) -> Tensor:
        if self.element == "fp8_e4m3":
            codes: Tensor = self.checkpoint.read(f"{self.base}.weight", rows).view(torch.uint8)
            return codes
        packed = self.checkpoint.read(f"{self.base}.weight_packed", rows)
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)

    def _scales(self, rows: slice) -> Tensor:
        """float32 [rows or 1, groups]."""
        name = f"{self.base}.weight_scale"
        info = self.checkpoint.tensors[name]
        if info.shape in ((), (1,)):
            return self.checkpoint.read(name).float().reshape(1, 1)
        stored = self.checkpoint.read(name, rows)
        if stored.dtype == torch.uint8:
            return number_format("e8m0").decode(stored)
        scales = stored.float().reshape(stored.shape[0], -1)
        divisor = f"{self.base}.weight_global_scale"
        return scales / self.checkpoint.read(divisor).float() if divisor in self.checkpoint.tensors else scales


def float_linear(checkpoint: Checkpoint, base: str, dtype: torch.dtype | None) -> FloatLinear:
    """The weight `base`; raises CheckpointError where its parts do not fit each other."""
    is_fp8 = f"{base}.weight" in checkpoint.tensors
    stored = checkpoint.tensors[f"{base}.weight" if is_fp8 else f"{base}.weight_packed"]
    scales = component(checkpoint, f"{base}.weight_scale", of=f"{base}.weight")
    if len(stored.shape) != 2:
        raise CheckpointError(
            f"{checkpoint.path}: {base!r} of shape {list(stored.shape)} is no matrix: download it again"
        )
    shape = (stored.shape[0], stored.shape[1] if is_fp8 else 2 * stored.shape[1])
    if is_fp8 and scales.dtype != torch.uint8:
        rows = scales.shape in ((), (1,), (shape[0],)) or (
            len(scales.shape) == 2 and scales.shape[0] == shape[0] and shape[1] % max(1, scales.shape[1]) == 0
        )
        expect(checkpoint, f"{base}.weight_scale", dtypes=_FLOATS, shape=scales.shape if rows else (shape[0], 1))
        return FloatLinear(checkpoint, base, TensorInfo(dtype or scales.dtype, shape), scales.dtype)
    has_divisor = f"{base}.weight_global_scale" in checkpoint.tensors
    kind, size = (_FP8, 16) if has_divisor else (torch.uint8, 32)
    expect(checkpoint, f"{base}.weight_scale", dtypes=(kind,), shape=(shape[0], shape[1] // size))
    if has_divisor:
        expect(checkpoint, f"{base}.weight_global_scale", dtypes=(torch.float32,), shape=(1,))
    return FloatLinear(checkpoint, base, TensorInfo(dtype or torch.bfloat16, shape), torch.bfloat16)


def float_bases(checkpoint: Checkpoint) -> list[str]:
    """The weights that are stored as small floats, in order."""
    tensors = checkpoint.tensors
    packed = [name for name, info in tensors.items() if name.endswith(".weight_packed") and info.dtype == torch.uint8]
    plain = [name for name, info in tensors.items() if name.endswith(".weight") and info.dtype == _FP8]
    bases = [name.removesuffix(".weight_packed") for name in packed] + [name.removesuffix(".weight") for name in plain]
    return sorted(bases)
