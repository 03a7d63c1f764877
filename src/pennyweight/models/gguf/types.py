"""The types of GGUF's tensors: blocks as schemes, packed and unpacked bit for bit, and plain floats.

ggml keeps the weights of a row in blocks of 32 or 256 with all that decodes them beside them. Each type here is a
scheme with a name of its own (`q4_k`), and the places of its codes, scales, offsets and parents in the bytes of a
block; numbers of more than a byte are little-endian. Source: ggml-common.h and ggml-quants.c of ggml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from pennyweight.core.errors import ShapeError, UsageError
from pennyweight.models.gguf.packing import Field, Part, codes, half, negated_half, pack, unpack
from pennyweight.schemes import Parameters, QuantizedWeight, Scheme, parse_scheme


@dataclass(frozen=True)
class BlockType:
    """A type whose weights lie in blocks.

    name         as ggml spells it, "Q4_K"
    number       ggml's number of it, as in a file's tensor infos
    weights      weights of a block, all of one row
    size_bytes   bytes of a block
    """

    name: str
    number: int
    scheme: Scheme
    weights: int
    size_bytes: int
    parts: Mapping[str, Part] = field(repr=False, compare=False)

    def pack(self, weight: QuantizedWeight) -> Tensor:
        """uint8 [rows, columns / weights * size_bytes] of `weight` [rows, columns]; raises UsageError for another
        scheme."""
        if weight.scheme != self.scheme:
            raise UsageError(
                f"a weight of {weight.scheme} given; {self.name} holds {self.scheme} only: solve it for that"
            )
        rows, columns = weight.shape
        count = columns // self.weights
        if not rows * count:
            return torch.empty(rows, count * self.size_bytes, dtype=torch.uint8, device=weight.codes.device)
        tensors = {name: getattr(weight, name) for name in self.parts}
        packed = pack(tensors, self.parts, blocks=rows * count, size_bytes=self.size_bytes)
        return packed.reshape(rows, count * self.size_bytes)

    def unpack(self, packed: Tensor, columns: int) -> QuantizedWeight:
        """The weight [rows, columns] of `packed` uint8 [rows, columns / weights * size_bytes]; raises ShapeError."""
        if columns % self.weights:
            raise ShapeError(
                f"{columns} columns do not come out even in blocks of {self.weights} weights of {self.name}"
            )
        size = columns // self.weights * self.size_bytes
        if packed.ndim != 2 or packed.shape[1] != size or packed.dtype != torch.uint8:
            raise ShapeError(
                f"{self.name} with {columns} columns: {tuple(packed.shape)} {packed.dtype} given, "
                f"expected a matrix of uint8 with {size} bytes a row"
            )
        rows, count = packed.shape[0], columns // self.weights
        found = unpack(packed.reshape(rows * count, self.size_bytes), self.parts)
        shaped = {name: tensor.reshape(rows, count * tensor.shape[1]) for name, tensor in found.items()}
        return QuantizedWeight.of(shaped.pop("codes"), Parameters(**shaped), self.scheme)


@dataclass(frozen=True)
class FloatType:
    """A type whose weights are floats, one after the other."""

    name: str
    number: int
    dtype: torch.dtype


def block_type_of(scheme: Scheme) -> BlockType | None:
    """The type that holds `scheme`, or None where GGUF has none."""
    return _BY_SCHEME.get(scheme)


def _six_bits(first: int, *, high: int) -> Part:
    """The eight scales or offsets of Q4_K and Q5_K, whose 12 bytes start at byte 4 of the block.

    Four bytes from `first` on hold the first four, and above them the two highest bits of the last four; these have
    their lower halves in the last four of the 12 bytes, from bit `high` there.
    """
    early, late, own, shared = slice(0, 4), slice(4, 8), slice(first, first + 4), slice(12, 16)
    fields = (Field(early, own, 6), Field(late, shared, 4, high=high), Field(late, own, 2, low=4, high=6))
    return Part(8, fields)


_MINIMA = {"scales": _six_bits(4, high=0), "offsets": _six_bits(8, high=4)}
_PARENTS = {"parents": half(0), "offset_parents": half(2)}

# The parts of each type by the names of QuantizedWeight's tensors.
_PARTS: dict[str, dict[str, Part]] = {
    # ggml's signed bytes are codes with the highest bit inverted.
    "Q8_0": {"scales": half(0), "codes": codes(32, 8, at=2, flip=0x80)},
    "Q4_0": {"scales": half(0), "codes": codes(32, 4, at=2, run=16)},
    # The minimum of the group is what is added: an offset is what is taken away.
    "Q4_1": {"scales": half(0), "offsets": negated_half(2), "codes": codes(32, 4, at=4, run=16)},
    "Q5_0": {"scales": half(0), "codes": codes(32, 4, at=6, run=16) + codes(32, 1, at=2, low=4)},
    "Q5_1": {
        "scales": half(0), "offsets": negated_half(2), "codes": codes(32, 4, at=8, run=16) + codes(32, 1, at=4, low=4),
    },
    "Q2_K": {
        "scales": Part(16, (Field(slice(0, 16), slice(0, 16), 4),)),
        "offsets": Part(16, (Field(slice(0, 16), slice(0, 16), 4, high=4),)),
        "codes": codes(256, 2, at=16, run=32), "parents": half(80), "offset_parents": half(82),
    },
    "Q3_K": {
        "codes": codes(256, 2, at=32, run=32) + codes(256, 1, at=0, run=32, low=2),
        "scales": codes(16, 4, at=96, run=8) + codes(16, 2, at=104, run=4, low=4), "parents": half(108),
    },
    "Q4_K": _PARENTS | _MINIMA | {"codes": codes(256, 4, at=16, run=32)},
    "Q5_K": _PARENTS | _MINIMA | {"codes": codes(256, 4, at=48, run=32) + codes(256, 1, at=16, run=32, low=4)},
    "Q6_K": {
        "codes": codes(256, 4, at=0, run=64) + codes(256, 2, at=128, run=32, low=4),
        "scales": codes(16, 8, at=192, flip=0x80), "parents": half(208),
    },
    "IQ4_NL": {"scales": half(0), "codes": codes(32, 4, at=2, run=16)},
    "IQ4_XS": {
        "parents": half(0), "scales": codes(8, 2, at=2, low=4) + codes(8, 4, at=4),
        "codes": codes(256, 4, at=8, run=16),
    },
    "MXFP4": {"scales": codes(1, 8, at=0), "codes": codes(32, 4, at=1, run=16)},
    "TQ2_0": {"codes": codes(256, 2, at=0, run=32), "scales": half(64)},
}  # fmt: skip


def _block_type(name: str) -> BlockType:
    kind = GGMLQuantizationType[name]
    # The word mxfp4 is that of the OCP format, which has a NaN among its scales.
    scheme = parse_scheme("mxfp4_ggml" if name == "MXFP4" else name.lower())
    return BlockType(name, kind.value, scheme, *GGML_QUANT_SIZES[kind], MappingProxyType(_PARTS[name]))


def _float_type(name: str, dtype: torch.dtype) -> FloatType:
    return FloatType(name, GGMLQuantizationType[name].value, dtype)


BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType({name: _block_type(name) for name in _PARTS})
FLOAT_TYPES: Mapping[str, FloatType] = MappingProxyType(
    {
        name: _float_type(name, dtype)
        for name, dtype in {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.items()
    }
)
_BY_SCHEME = {one.scheme: one for one in BLOCK_TYPES.values()}
