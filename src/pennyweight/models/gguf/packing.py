"""Blocks of bytes and the tensors whose bits lie in them.

A block holds a run of weights of one row: their codes, scales, offsets and parents, each at fixed bits. Tensors are
moved as bytes and never computed with, so that every bit survives, those of float16 NaNs too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map

# Bytes of numbers moved at a time: they and the temporaries stay in a core's second-level cache.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class Field:
    """`bits` bits of some numbers: in the number from bit `low`, in the block's bytes from bit `high`.

    numbers   which bytes of the tensor in a block, as many as there are in `place`
    place     which bytes of the block
    flip      bits of the number that the block holds inverted
    """

    numbers: slice
    place: slice
    bits: int = 8
    low: int = 0
    high: int = 0
    flip: int = 0

    def pack_(self, numbers: Tensor, block: Tensor) -> None:
        """Puts the bits of `numbers` uint8 [blocks, size] into `block` uint8 [blocks, bytes], where they are 0 yet."""
        x = numbers[:, self.numbers]
        x = x ^ self.flip if self.flip else x
        x = x >> self.low if self.low else x
        x = x & self._mask if self.low + self.bits < 8 else x
        block[:, self.place].bitwise_or_(x << self.high if self.high else x)

    def unpack_(self, block: Tensor, numbers: Tensor) -> None:
        """The inverse: puts them into `numbers`, where they are 0 yet."""
        x = block[:, self.place]
        x = x >> self.high if self.high else x
        x = x & self._mask if self.high + self.bits < 8 else x
        x = x << self.low if self.low else x
        numbers[:, self.numbers].bitwise_or_(x ^ self.flip if self.flip else x)

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Part:
    """Where one tensor lies in a block: `size` bytes of it, in `fields`; `dtype` is that of its numbers."""

    size: int
    fields: tuple[Field, ...]
    dtype: torch.dtype = torch.uint8

    def __add__(self, other: Part) -> Part:
        """The same numbers with more of their bits."""
        return Part(self.size, (*self.fields, *other.fields), self.dtype)


def codes(count: int, bits: int, at: int, *, run: int = 1, low: int = 0, flip: int = 0) -> Part:
    """`bits` bits of each of `count` codes, from their bit `low`, in the block's bytes from `at` on.

    Each `run` bytes hold 8 / bits times as many codes: their lowest bits the first `run` of these, and so on upwards.
    """
    per = 8 // bits
    if run == 1:
        # Alike for every byte, so that all bytes go in one step.
        every = slice(at, at + count // per)
        return Part(count, tuple(Field(slice(i, count, per), every, bits, low, bits * i, flip) for i in range(per)))
    starts = [(run * i, at + run * (i // per), bits * (i % per)) for i in range(count // run)]
    fields = (
        Field(slice(first, first + run), slice(place, place + run), bits, low, high, flip)
        for first, place, high in starts
    )
    return Part(count, tuple(fields))


def half(at: int) -> Part:
    """A float16 in the two bytes from `at` on."""
    return Part(2, (Field(slice(0, 2), slice(at, at + 2)),), torch.float16)


def negated_half(at: int) -> Part:
    """A float16 whose negative is in the two bytes from `at` on."""
    fields = (Field(slice(0, 1), slice(at, at + 1)), Field(slice(1, 2), slice(at + 1, at + 2), flip=0x80))
    return Part(2, fields, torch.float16)


def pack(tensors: Mapping[str, Tensor], parts: Mapping[str, Part], *, blocks: int, size_bytes: int) -> Tensor:
    """uint8 [blocks, size_bytes] with each of `tensors`, which hold their blocks one after the other, at its part."""
    packed = torch.zeros(blocks, size_bytes, dtype=torch.uint8, device=tensors["codes"].device)
    given = {name: _bytes(tensors[name]).reshape(blocks, part.size) for name, part in parts.items()}

    def one(rows: slice) -> None:
        for name, part in parts.items():
            for field in part.fields:
                field.pack_(given[name][rows], packed[rows])

    parallel_map(one, chunks(blocks, _CHUNK // parts["codes"].size))
    return packed


def unpack(packed: Tensor, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The inverse: tensors [blocks, numbers] of `packed` uint8 [blocks, size_bytes]."""
    blocks = packed.shape[0]
    found = {
        name: torch.zeros(blocks, part.size, dtype=torch.uint8, device=packed.device) for name, part in parts.items()
    }

    def one(rows: slice) -> None:
        for name, part in parts.items():
            for field in part.fields:
                field.unpack_(packed[rows], found[name][rows])

    parallel_map(one, chunks(blocks, _CHUNK // parts["codes"].size))
    return {name: tensor.view(parts[name].dtype) for name, tensor in found.items()}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
