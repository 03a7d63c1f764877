"""AWQ checkpoints of 4 bits as AutoAWQ writes them (`quant_method: awq`, version "gemm").

    qweight  int32 [in, out / 8]       eight codes a word, outputs 0 2 4 6 1 3 5 7 from the lowest bits up
    qzeros   int32 [groups, out / 8]   in the same order
    scales         [groups, out]
    weight[o, i] = (code[o, i] - zero[i // group size, o]) * scale[i // group size, o]

https://github.com/casper-hansen/AutoAWQ (awq/utils/packing_utils.py).
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

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Where in its word output 0, 1, ... 7 is: the inverse of the order above.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class _Linear:
    checkpoint: Checkpoint
    base: str
    info: TensorInfo
    groups: int

    def read(self, part: slice | None) -> Tensor:
        inputs = self.info.shape[1]
        first, last = row_range(self.base, self.info.shape, part or slice(None))
        columns = torch.arange(inputs) // max(1, inputs // self.groups)
        return affine(*self._parts(first, last), groups=columns, dtype=self.info.dtype)

    def coded(self) -> Coded | None:
        """None where there is nothing."""
        outputs, inputs = self.info.shape
        if not inputs:
            return None
        dtype = self.checkpoint.tensors[f"{self.base}.scales"].dtype
        scheme = asymmetric(4, dtype, size=inputs // self.groups)
        return Coded(scheme, lambda: integers(*self._parts(0, outputs), scheme=scheme))

    def _parts(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [rows, in], zero points and scales [rows, groups] of the rows from `first` to before `last`."""

        def codes(kind: str) -> Tensor:
            """[in or groups, out / 8] words -> uint8 [rows asked, in or groups]."""
            # Whole words only: those that hold the rows asked.
            words = self.checkpoint.read(f"{self.base}.{kind}")[:, first // 8 : -(-last // 8)].contiguous()
            found = unpack_int32(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)[..., _PLACES]
            start = first % 8
            return found.reshape(len(words), -1)[:, start : start + last - first].T.contiguous()

        scales = self.checkpoint.read(f"{self.base}.scales").T[first:last].contiguous()
        return codes("qweight"), codes("qzeros"), scales


@dataclass(frozen=True)
class Awq:
    """`quant_method: awq`."""

    name: str = "awq"

    def open(self, checkpoint: Checkpoint, settings: Mapping[str, Any], dtype: torch.dtype | None) -> Decoding:
        version = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
        bits = settings.get("bits", settings.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise CheckpointError(
                f"{checkpoint.path}: its AWQ weights are of version {version!r} with {bits} bits; known is 'gemm' with "
                "4 bits. Give the original model."
            )
        tensors: dict[str, Virtual] = {}
        consumed: set[str] = set()
        for base in suffixed(checkpoint, ".qweight"):
            linear = _linear(checkpoint, base, dtype)
            tensors[f"{base}.weight"] = Virtual(linear.info, linear.read, linear.coded)
            consumed |= companions(checkpoint, base, (".qweight", ".qzeros", ".scales"))
        return Decoding("awq weights of 4 bits", tensors, frozenset(consumed))


def _linear(checkpoint: Checkpoint, base: str, dtype: torch.dtype | None) -> _Linear:
    qweight, qzeros, scales = (f"{base}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    for name in (qweight, qzeros, scales):
        component(checkpoint, name, of=f"{base}.weight")
    inputs = (*checkpoint.tensors[qweight].shape, 0)[0]
    stored = checkpoint.tensors[scales]
    groups, outputs = (*stored.shape, 0, 0)[:2]
    expect(checkpoint, scales, dtypes=_FLOATS, shape=(groups, outputs))
    expect(checkpoint, qweight, dtypes=(torch.int32,), shape=(inputs, -(-outputs // 8)))
    expect(checkpoint, qzeros, dtypes=(torch.int32,), shape=(groups, -(-outputs // 8)))
    if groups < 1 or inputs % groups or outputs % 8:
        raise CheckpointError(
            f"{checkpoint.path}: '{base}' has {inputs} inputs in {groups} groups and {outputs} outputs; the groups "
            "must divide the inputs and 8 the outputs. The checkpoint is damaged: download it again."
        )
    return _Linear(checkpoint, base, TensorInfo(dtype or stored.dtype, (outputs, inputs)), groups)


PROVIDES: tuple[Decoder, ...] = (Awq(),)
