"""The packed layout is compressed-tensors' own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.errors import ShapeError, UsageError
from pennyweight.kernels import packing
from pennyweight.kernels.packing import pack_int32, packed_words, unpack_int32

SHAPES = st.tuples(st.integers(0, 9), st.integers(0, 130))


def random_codes(rows: int, cols: int, *, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator)


def textbook(codes: Tensor, bits: int) -> list[list[int]]:
    """Each row as one long Python integer, cut into words."""
    out = []
    for row in codes.tolist():
        number = sum(code << (i * bits) for i, code in enumerate(row))
        out.append([(number >> (32 * k)) & 0xFFFFFFFF for k in range(packed_words(len(row), bits))])
    return out


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, bits=st.integers(2, 8), seed=st.integers(0, 10))
def test_words_are_those_of_compressed_tensors_and_come_back(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(*shape, bits=bits, seed=seed)
    words = pack_int32(codes, bits)
    assert words.shape == (shape[0], packed_words(shape[1], bits))
    assert torch.equal(unpack_int32(words, bits, shape[1]), codes)
    if codes.numel():
        values = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(words, pack_to_int32(values, bits))
        assert torch.equal(unpack_from_int32(words, bits, torch.Size(shape)), values)


@pytest.mark.parametrize("bits", range(2, 9))
def test_element_i_lies_at_bit_i_times_bits(bits: int) -> None:
    codes = random_codes(3, 45, bits=bits)
    assert [[word & 0xFFFFFFFF for word in row] for row in pack_int32(codes, bits).tolist()] == textbook(codes, bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_chunks_change_speed_only(bits: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(17, 75, bits=bits)
    expected = pack_int32(codes, bits)
    monkeypatch.setattr(packing, "_CHUNK", chunk)
    assert torch.equal(pack_int32(codes, bits), expected)
    assert torch.equal(unpack_int32(expected, bits, 75), codes)


def test_strided_codes_pack_like_contiguous_ones() -> None:
    codes = random_codes(64, 40, bits=4).T
    assert torch.equal(pack_int32(codes, 4), pack_int32(codes.contiguous(), 4))
    assert torch.equal(pack_int32(codes[:, :33], 3), pack_int32(codes[:, :33].contiguous(), 3))


def test_wrong_widths_types_and_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="9 bits"):
        pack_int32(random_codes(1, 1, bits=8), 9)
    with pytest.raises(ShapeError, match="uint8"):
        pack_int32(torch.zeros(2, 2), 4)
    with pytest.raises(ShapeError, match="give 2 words"):
        unpack_int32(torch.zeros(1, 1, dtype=torch.int32), 4, 9)
