"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them (`quant_method: gptq`).

    qweight  int32 [in * bits / 32, out]       codes of each column, packed densely along the input
    qzeros   int32 [groups, out * bits / 32]   zero points, packed densely along the output; one less than they are
                                               (modulo 2**bits) in the format "gptq", as they are in "gptq_v2"
    scales         [groups, out]
    g_idx    int32 [in]                        group of each input, any order with desc_act; absent: consecutive
    weight[o, i] = (code[o, i] - zero[g_idx[i], o]) * scale[g_idx[i], o]

https://github.com/AutoGPTQ/AutoGPTQ (nn_modules/qlinear/qlinear_cuda.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.kernels.packing import unpack_int32
from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.models.checkpoint import row_range
from pennyweight.models.decoders.base import (
    Coded,
    Decoder,
    Decoding,
    Virtual,
    affine,
    asymmetric,
    companions,
    component,
    expect,
    integers,
    suffixed,
)

_BITS = (2, 3, 4, 8)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Added to the stored zero points.
_ZERO_SHIFT = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class _Linear:
    checkpoint: Checkpoint
    base: str
    info: TensorInfo
    bits: int
    zero_shift: int
    groups: Tensor

    def read(self, part: slice | None) -> Tensor:
        first, last = row_range(self.base, self.info.shape, part or slice(None))
        codes, zeros, scales = self._parts(slice(first, last))
        return affine(codes, zeros, scales, groups=self.groups, dtype=self.info.dtype)

    def coded(self) -> Coded | None:
        """None where the inputs of a group do not lie together."""
        outputs, inputs = self.info.shape
        groups = self.checkpoint.tensors[f"{self.base}.scales"].shape[0]
        if not inputs or inputs % groups or not torch.equal(self.groups, torch.arange(inputs) // (inputs // groups)):
            return None
        scheme = asymmetric(self.bits, self.checkpoint.tensors[f"{self.base}.scales"].dtype, size=inputs // groups)
        return Coded(scheme, lambda: integers(*self._parts(slice(0, outputs)), scheme=scheme))

    def _parts(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [rows, in], zero points and scales [rows, groups]."""
        outputs, inputs = self.info.shape
        words = self.checkpoint.read(f"{self.base}.qweight")[:, rows].T.contiguous()
        zeros = unpack_int32(self.checkpoint.read(f"{self.base}.qzeros"), self.bits, outputs)
        # Modulo 2**bits: a zero point of 0 is stored as the largest code.
        zeros = zeros.add_(self.zero_shift).bitwise_and_((1 << self.bits) - 1)
        scales = self.checkpoint.read(f"{self.base}.scales")
        return unpack_int32(words, self.bits, inputs), zeros.T[rows].contiguous(), scales.T[rows].contiguous()


@dataclass(frozen=True)
class Gptq:
    """`quant_method: gptq`."""

    name: str = "gptq"

    def open(self, checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: torch.dtype | None) -> Decoding:
        kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if kind not in _ZERO_SHIFT:
            raise CheckpointError(
                f"{checkpoint.path}: its GPTQ weights are in the format {kind!r}; known are {', '.join(_ZERO_SHIFT)}. "
                "Give the original model, or save it in one of them."
            )
        tensors: dict[str, Virtual] = {}
        consumed: set[str] = set()
        widths: set[int] = set()
        for base in suffixed(checkpoint, ".qweight"):
            linear = _linear(checkpoint, base, settings, zero_shift=_ZERO_SHIFT[kind], dtype=dtype)
            tensors[f"{base}.weight"] = Virtual(linear.info, linear.read, linear.coded)
            consumed |= companions(checkpoint, base, (".qweight", ".qzeros", ".scales", ".g_idx"))
            widths.add(linear.bits)
        return Decoding(f"gptq weights of {' and '.join(map(str, sorted(widths)))} bits", tensors, frozenset(consumed))


def _linear(
    checkpoint: Checkpoint, base: str, settings: Mapping[str, Any], *, zero_shift: int, dtype: torch.dtype | None
) -> _Linear:
    qweight, qzeros, scales = (f"{base}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    for name in (qweight, qzeros, scales):
        component(checkpoint, name, of=f"{base}.weight")
    stored = checkpoint.tensors[scales]
    groups, outputs = (*stored.shape, 0, 0)[:2]
    bits = _bits(checkpoint, base, settings, outputs=outputs)
    words = (*checkpoint.tensors[qweight].shape, 0)[0]
    inputs = words * 32 // bits
    expect(checkpoint, scales, dtypes=_FLOATS, shape=(groups, outputs))
    expect(checkpoint, qweight, dtypes=(torch.int32,), shape=(-(-inputs * bits // 32), outputs))
    expect(checkpoint, qzeros, dtypes=(torch.int32,), shape=(groups, -(-outputs * bits // 32)))
    of_column = _groups(checkpoint, base, inputs=inputs, groups=groups)
    return _Linear(checkpoint, base, TensorInfo(dtype or stored.dtype, (outputs, inputs)), bits, zero_shift, of_column)


def _bits(checkpoint: Checkpoint, base: str, settings: Mapping[str, Any], *, outputs: int) -> int:
    """Bits of a code, seen from the zero points' width; a config with `dynamic` rules may give each layer its own."""
    words = checkpoint.tensors[f"{base}.qzeros"].shape[-1:] or (0,)
    found = words[0] * 32 // outputs if outputs else 0
    given = settings.get("bits")
    if found not in _BITS or (found != given and not settings.get("dynamic")):
        raise CheckpointError(
            f"{checkpoint.path}: '{base}.qzeros' holds {found} bits for each of {outputs} outputs, the config says "
            f"{given}; known are {', '.join(map(str, _BITS))}. Give the original model."
        )
    return found


def _groups(checkpoint: Checkpoint, base: str, *, inputs: int, groups: int) -> Tensor:
    """The group of each input column, int64 [in]."""
    name = f"{base}.g_idx"
    if name in checkpoint.tensors:
        expect(checkpoint, name, dtypes=(torch.int32, torch.int64), shape=(inputs,))
        found = checkpoint.read(name).long()
        if inputs and (int(found.min()) < 0 or int(found.max()) >= groups):
            raise CheckpointError(
                f"{checkpoint.path}: {name!r} has groups from {int(found.min())} to {int(found.max())}, "
                f"but there are {groups}, counted from 0. The checkpoint is damaged: download it again."
            )
        return found
    if groups < 1 or inputs % groups:
        raise CheckpointError(
            f"{checkpoint.path}: '{base}.scales' has {groups} groups, which do not divide {inputs} inputs, "
            f"and there is no {name!r}. The checkpoint is incomplete: download it again."
        )
    return torch.arange(inputs) // (inputs // groups)


PROVIDES: tuple[Decoder, ...] = (Gptq(),)
