"""MXFP4 as gpt-oss stores its experts (`quant_method: mxfp4`).

    X_blocks  uint8 [experts, out, groups, 16]   two e2m1 codes a byte, the low half first
    X_scales  uint8 [experts, out, groups]       e8m0: scale = 2**(byte - 127)
    X[e, g * 32 + j, o] = value(code[e, o, g, j]) * scale[e, o, g]

The decoded tensor X [experts, in, out] is transposed, as the model's own parameter is: transformers'
integrations/mxfp4.py, `convert_moe_packed_tensors`, which this agrees with bit for bit.
OCP Microscaling Formats (MX) Specification v1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.parallel import parallel_map
from pennyweight.formats.minifloat import FP4_E2M1
from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.models.checkpoint import row_range
from pennyweight.models.decoders.base import Decoder, Decoding, Virtual, component, expect, suffixed


@dataclass(frozen=True)
class _Experts:
    checkpoint: Checkpoint
    name: str
    info: TensorInfo

    def read(self, part: slice | None) -> Tensor:
        first, last = row_range(self.name, self.info.shape, part or slice(None))
        blocks = self.checkpoint.read(f"{self.name}_blocks", slice(first, last))
        scales = self.checkpoint.read(f"{self.name}_scales", slice(first, last)).view(torch.uint8)
        out = torch.empty((last - first, *self.info.shape[1:]), dtype=self.info.dtype)

        def one(expert: int) -> None:
            out[expert] = _decode(blocks[expert], scales[expert], self.info.dtype).T

        parallel_map(one, range(last - first))
        return out


def _decode(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks [out, groups, 16] and scales [out, groups] -> [out, in], the product in float32, rounded to `dtype`."""
    # Both values of a byte at once.
    byte = torch.arange(256)
    pairs = FP4_E2M1.decode(torch.stack([byte & 15, byte >> 4], dim=-1))
    values = pairs.index_select(0, blocks.reshape(-1).int()).reshape(*blocks.shape[:2], 32)
    weights = torch.ldexp(values, scales.int().sub_(127)[..., None])
    return weights.reshape(blocks.shape[0], -1).to(dtype)


@dataclass(frozen=True)
class Mxfp4:
    """`quant_method: mxfp4`."""

    name: str = "mxfp4"

    def open(self, checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: torch.dtype | None) -> Decoding:
        tensors: dict[str, Virtual] = {}
        consumed: set[str] = set()
        for name in suffixed(checkpoint, "_blocks"):
            blocks, scales = f"{name}_blocks", f"{name}_scales"
            component(checkpoint, scales, of=name)
            # A fifth axis or a missing one would be another model's arrangement.
            experts, out, groups = (*checkpoint.tensors[blocks].shape, 0, 0, 0)[:3]
            expect(checkpoint, blocks, dtypes=(torch.uint8,), shape=(experts, out, groups, 16))
            expect(checkpoint, scales, dtypes=(torch.uint8, torch.float8_e8m0fnu), shape=(experts, out, groups))
            info = TensorInfo(dtype or torch.bfloat16, (experts, groups * 32, out))
            tensors[name] = Virtual(info, _Experts(checkpoint, name, info).read)
            consumed |= {blocks, scales}
        return Decoding("mxfp4 weights, one e8m0 scale per 32", tensors, frozenset(consumed))


PROVIDES: tuple[Decoder, ...] = (Mxfp4(),)
