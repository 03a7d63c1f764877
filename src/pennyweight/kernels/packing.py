"""Codes of 2 to 8 bits packed densely into int32 words, row by row, and back.

Element i of a row lies at the bits [i * bits, (i + 1) * bits) of the row's little-endian words; the last word of
a row is filled up with zeros. This is the layout of compressed-tensors 0.18 and later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError, UsageError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.native import kernel_table, native

# Codes per chunk: input, output and two temporaries of this length stay in a core's second-level cache. The native
# kernel has no temporaries.
_CHUNK, _NATIVE_CHUNK = 1 << 17, 1 << 21


def packed_words(cols: int, bits: int) -> int:
    """int32 words that hold `cols` codes of `bits` bits."""
    return -(-cols * bits // 32)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, cols], each below 2**bits, as int32 words [rows, ceil(cols * bits / 32)].

    >>> pack_int32(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0xF21]]
    True
    """
    _check(codes, bits, dtype=torch.uint8)
    rows, cols = codes.shape
    words = torch.empty(rows, packed_words(cols, bits), dtype=torch.int32, device=codes.device)
    is_native = bits == 4 and cols % 8 == 0 and codes.device.type == "cpu" and native() is not None

    def one(part: slice) -> None:
        piece = codes[part]
        if is_native:
            _pack_nibbles(piece.contiguous(), words[part])
            return
        if cols % 32:
            piece = torch.nn.functional.pad(piece, (0, -cols % 32))
        packed = _fold(piece.contiguous().view(-1), bits).view(torch.int32)
        words[part] = packed.view(piece.shape[0], -1)[:, : words.shape[1]]

    if words.numel():
        parallel_map(one, chunks(rows, max(1, (_NATIVE_CHUNK if is_native else _CHUNK) // cols)))
    return words


def unpack_int32(words: Tensor, bits: int, cols: int) -> Tensor:
    """The inverse of `pack_int32`: uint8 codes [rows, cols] of int32 `words` [rows, ceil(cols * bits / 32)]."""
    _check(words, bits, dtype=torch.int32)
    rows, length = words.shape
    if length != packed_words(cols, bits):
        raise ShapeError(
            f"{length} words a row do not hold {cols} codes of {bits} bits: give {packed_words(cols, bits)} words a row"
        )
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=words.device)

    def one(part: slice) -> None:
        piece = words[part]
        if length % bits:
            piece = torch.nn.functional.pad(piece, (0, -length % bits))
        unpacked = _unfold(piece.contiguous().view(-1).view(torch.uint8), bits)
        codes[part] = unpacked.view(piece.shape[0], -1)[:, :cols]

    if codes.numel():
        parallel_map(one, chunks(rows, max(1, _CHUNK // cols)))
    return codes


def _check(tensor: Tensor, bits: int, *, dtype: torch.dtype) -> None:
    if not 2 <= bits <= 8:
        raise UsageError(f"codes of {bits} bits cannot be packed: give 2 to 8")
    if tensor.dtype != dtype or tensor.ndim != 2:
        raise ShapeError(f"cannot pack or unpack {tensor.dtype} {tuple(tensor.shape)}: give a matrix of {dtype}")


def _fold(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n], n a multiple of 32, as n * bits / 8 bytes."""
    match bits:
        case 8:
            return codes
        case 4:
            x = codes.view(torch.int16)
            return (x >> 4).bitwise_or_(x).to(torch.uint8)
        case 2:
            x = codes.view(torch.int32)
            x = (x >> 6).bitwise_or_(x)
            return (x >> 12).bitwise_or_(x).to(torch.uint8)
    # Eight codes in an int64 slide together, first within pairs, then fours, then all; `bits` bytes are left.
    x = codes.view(torch.int64)
    for count in (1, 2, 4):
        upper = x & _fields(count * bits, start=8 * count, spacing=16 * count)
        x = (x ^ upper).bitwise_or_(upper.bitwise_right_shift_(count * (8 - bits)))
    return x.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)


def _pack_nibbles(codes: Tensor, words: Tensor) -> None:
    """The same as `_fold`, for 4 bits, into `words`."""
    library = native()
    assert library is not None
    library.pack_nibbles(codes.view(-1), words.view(-1).view(torch.uint8), kernel_table())


def _unfold(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_fold`."""
    match bits:
        case 8:
            return packed
        case 4:
            x = packed.to(torch.int16)
            return (x << 4).bitwise_or_(x).bitwise_and_(0x0F0F).view(torch.uint8)
        case 2:
            x = packed.to(torch.int32)
            x = (x << 12).bitwise_or_(x)
            return (x << 6).bitwise_or_(x).bitwise_and_(0x03030303).view(torch.uint8)
    x = torch.nn.functional.pad(packed.view(-1, bits), (0, 8 - bits)).view(-1).view(torch.int64)
    for count in (4, 2, 1):
        upper = x & _fields(count * bits, start=count * bits, spacing=16 * count)
        x = (x ^ upper).bitwise_or_(upper.bitwise_left_shift_(count * (8 - bits)))
    return x.view(torch.uint8)


def _fields(width: int, *, start: int, spacing: int) -> int:
    """A mask of fields of `width` bits in 64, at `start` and every `spacing` bits from there."""
    return sum(((1 << width) - 1) << low for low in range(start, 64, spacing))
