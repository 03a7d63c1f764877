"""How the codes of a site lie in a file: as a tensor of integers, or in the blocks of MatMulNBits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pennyweight.containers.onnx.packing import pack, to_bytes, unpack
from pennyweight.formats.integer import Int
from pennyweight.models.network.network import NetworkSite
from pennyweight.schemes import PerGroup, PerTensor, QuantizedWeight, Scheme


@dataclass(frozen=True)
class Array:
    """A tensor of an ONNX file: the name of its ONNX type, its shape, and its bytes as in raw_data."""

    type: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Stored:
    """The tensors of one site. Both forms: `codes`, `scales` (FLOAT) and, where the scheme has them or the form needs
    them, `zeros`.

    bits      of a stored integer: 2, 4 or 8, at least those of a code
    block     weights of a block of MatMulNBits and GatherBlockQuantized; None: a tensor of integers
    is_filled  blocks: whether the last block of a row is filled up (linear maps) or cut (embeddings)
    is_full    blocks: scales once a block, even where consecutive blocks share one
    is_spread  tensors: scales are shaped so that they can be multiplied with, not as DequantizeLinear wants them
    """

    site: NetworkSite
    scheme: Scheme
    bits: int
    block: int | None = None
    is_filled: bool = False
    is_full: bool = False
    is_spread: bool = False

    @property
    def element(self) -> Int:
        assert isinstance(self.scheme.element, Int)
        return self.scheme.element

    @property
    def type(self) -> str:
        """Of `codes`, and of `zeros` that are integers."""
        if self.block is not None:
            return "UINT8"
        if self.bits < 8:
            return f"{'INT' if self.element.signed else 'UINT'}{self.bits}"
        # ONNX Runtime is faster with signed weights, and OpenVINO has no product of two unsigned ones. A float zero
        # point cannot be moved exactly.
        return "UINT8" if self._is_uint8 and self.has_float_zeros else "INT8"

    @property
    def shift(self) -> int:
        """Stored integer - value of the number format."""
        if self.block is not None:
            return 1 << (self.bits - 1) if self.element.signed else 0
        return -128 if self._is_uint8 and not self.has_float_zeros else 0

    @property
    def _is_uint8(self) -> bool:
        return self.element.bits == 8 and not self.element.signed

    @property
    def axis(self) -> int | None:
        """That of the scales in the shape that torch has, if there is one; None: codes are the matrix [out, in]."""
        if isinstance(self.scheme.granularity, PerGroup):
            return None
        if self.site.kind != "conv_transpose" or isinstance(self.scheme.granularity, PerTensor):
            return 0
        return 1 if self.site.groups == 1 else None

    @property
    def groups(self) -> tuple[int, int]:
        """[rows, groups] of the scheme's scales."""
        return self.scheme.scale_shape(self.site.matrix_shape)

    @property
    def blocks(self) -> int:
        """Of a row."""
        assert self.block is not None
        return -(-self.site.matrix_shape[1] // self.block)

    @property
    def row_bytes(self) -> int:
        """Of the codes of a row in blocks."""
        assert self.block is not None
        inputs = self.blocks * self.block if self.is_filled else self.site.matrix_shape[1]
        return -(-inputs * self.bits // 8)

    @property
    def has_zeros(self) -> bool:
        """Blocks mean by no zero points the middle of the integers, tensors 0."""
        middle = 1 << (self.bits - 1) if self.block is not None else 0
        return self.scheme.zero is not None or middle != self.shift

    @property
    def has_float_zeros(self) -> bool:
        return self.scheme.zero is not None and not self.scheme.has_integer_zero

    @cached_property
    def size_bytes(self) -> int:
        """Exact: of all tensors of the site."""
        rows, groups = self.groups
        if self.block is None:
            outputs, inputs = self.site.matrix_shape
            zeros = rows * groups * (32 if self.has_float_zeros else self.bits) if self.has_zeros else 0
            return -(-outputs * inputs * self.bits // 8) + 4 * rows * groups + -(-zeros // 8)
        outputs = self.site.matrix_shape[0]
        scales = 4 * (outputs * self.blocks if self.is_full else rows * groups)
        zeros = 4 * outputs * self.blocks if self.has_float_zeros else outputs * -(-self.blocks * self.bits // 8)
        return outputs * self.row_bytes + scales + (zeros if self.has_zeros else 0)

    def arrays(self, weight: QuantizedWeight) -> dict[str, Array]:
        """The tensors that hold `weight`: `codes`, `scales` and perhaps `zeros`."""
        values = weight.codes.to(torch.int16) + int(self.element.smallest) + self.shift
        zeros = None if weight.zeros is None else weight.zeros.cpu()
        if zeros is None and self.has_zeros:
            zeros = torch.zeros(self.groups, dtype=torch.int16)
        if zeros is not None and not self.has_float_zeros:
            zeros = zeros + self.shift
        parts = (values.cpu(), weight.scales.cpu(), zeros)
        return self._tensor(*parts) if self.block is None else self._blocks(*parts)

    def _tensor(self, values: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Array]:
        lies = values if self.axis is None else self.site.tensor(values)
        arrays = {
            "codes": Array(self.type, tuple(lies.shape), to_bytes(pack(lies.reshape(-1), self.bits))),
            "scales": _floats(scales.reshape(self.scale_shape)),
        }
        if zeros is not None and self.has_float_zeros:
            arrays["zeros"] = _floats(zeros.reshape(self.scale_shape))
        elif zeros is not None:
            arrays["zeros"] = Array(self.type, self.scale_shape, to_bytes(pack(zeros.reshape(-1), self.bits)))
        return arrays

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the scales of a tensor of integers."""
        match self.scheme.granularity:
            case PerTensor():
                return ()
            case PerGroup():
                return (*self.groups, 1) if self.is_spread else self.groups
        if not self.is_spread:
            return (self.groups[0],)
        axes = 2 if self.axis is None else len(self.site.shape)
        return tuple(self.groups[0] if axis == (self.axis or 0) else 1 for axis in range(axes))

    def _blocks(self, values: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Array]:
        assert self.block is not None
        outputs, inputs = self.site.matrix_shape
        if self.is_filled:
            values = torch.nn.functional.pad(values, (0, self.blocks * self.block - inputs))
        codes = pack(values, self.bits)
        shape = (outputs, self.blocks, -1) if self.is_filled else (outputs, -1)
        codes = codes.reshape(shape)
        arrays = {"codes": Array("UINT8", tuple(codes.shape), to_bytes(codes))}
        arrays["scales"] = _floats(self.a_block(scales) if self.is_full else scales)
        if zeros is not None and self.has_float_zeros:
            arrays["zeros"] = _floats(self.a_block(zeros))
        elif zeros is not None:
            packed = pack(self.a_block(zeros), self.bits)
            arrays["zeros"] = Array("UINT8", tuple(packed.shape), to_bytes(packed))
        return arrays

    def a_block(self, shared: Tensor) -> Tensor:
        """[rows, groups] -> [out, blocks]."""
        outputs = self.site.matrix_shape[0]
        each = shared.expand(outputs, shared.shape[1])
        return each.repeat_interleave(self.blocks // shared.shape[1], dim=1)

    def weight(self, arrays: Mapping[str, Array]) -> QuantizedWeight:
        """The inverse of `arrays`."""
        values = self._values(arrays["codes"]) - self.shift - int(self.element.smallest)
        scales = self._shared(_tensor_of(arrays["scales"]), is_full=self.is_full)
        zeros = None
        if self.has_float_zeros:
            zeros = self._shared(_tensor_of(arrays["zeros"]), is_full=True)
        elif self.scheme.zero is not None:
            zeros = self._integer_zeros(arrays["zeros"]) - self.shift
        return QuantizedWeight(values.to(torch.uint8), scales, zeros, self.scheme)

    def _values(self, codes: Array) -> Tensor:
        """Stored integers [out, in]."""
        outputs, inputs = self.site.matrix_shape
        packed = torch.frombuffer(bytearray(codes.data), dtype=torch.uint8)
        if self.block is not None:
            return unpack(packed.reshape(outputs, -1), self.bits, inputs, signed=False)
        values = unpack(packed, self.bits, outputs * inputs, signed=self.type.startswith("INT"))
        return values.reshape(outputs, inputs) if self.axis is None else self.site.matrix(values.reshape(codes.shape))

    def _integer_zeros(self, zeros: Array) -> Tensor:
        packed = torch.frombuffer(bytearray(zeros.data), dtype=torch.uint8)
        rows, groups = self.groups
        if self.block is None:
            return unpack(packed, self.bits, rows * groups, signed=self.type.startswith("INT")).reshape(rows, groups)
        outputs = self.site.matrix_shape[0]
        return self._shared(unpack(packed.reshape(outputs, -1), self.bits, self.blocks, signed=False), is_full=True)

    def _shared(self, numbers: Tensor, *, is_full: bool) -> Tensor:
        """The inverse of `a_block`, where `is_full` and there are blocks."""
        rows, groups = self.groups
        if self.block is None or not is_full:
            return numbers.reshape(rows, groups)
        return numbers.reshape(self.site.matrix_shape[0], self.blocks)[:rows, :: self.blocks // groups].contiguous()


def _floats(tensor: Tensor) -> Array:
    return Array("FLOAT", tuple(tensor.shape), to_bytes(tensor.float()))


def _tensor_of(array: Array) -> Tensor:
    return torch.frombuffer(bytearray(array.data), dtype=torch.float32).reshape(array.shape)
