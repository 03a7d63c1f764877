"""The block types of GGUF: every block there can be, against the decoding of the gguf package."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.errors import ShapeError, UsageError
from pennyweight.models.gguf.types import BLOCK_TYPES, FLOAT_TYPES, BlockType, block_type_of
from pennyweight.schemes import QuantizedWeight, parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest

SCHEMES = {
    "Q8_0": "int8-g32-f16-f32",
    "Q4_0": "int4-g32-f16-f32",
    "Q4_1": "uint4-g32-offset-f16",
    "Q5_0": "int5-g32-f16-f32",
    "Q5_1": "uint5-g32-offset-f16",
    "Q2_K": "uint2-g16-offset-uint4x16.f16",
    "Q3_K": "int3-g16-int6x16.f16",
    "Q4_K": "uint4-g32-offset-uint6x8.f16",
    "Q5_K": "uint5-g32-offset-uint6x8.f16",
    "Q6_K": "int6-g16-int8x16.f16",
    "IQ4_NL": "iq4_nl-g32-f16-f32",
    "IQ4_XS": "iq4_nl-g32-int6x8.f16",
    "MXFP4": "fp4_e2m1_doubled-g32-e8m0_halved",
    "TQ2_0": "ternary-g256-f16-f32",
}
# Where ggml's structures have their float16 (ggml-common.h).
HALVES: dict[str, tuple[int, ...]] = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (), "TQ2_0": (64,),
}  # fmt: skip
# 0, the smallest and the largest subnormal, 1, the largest, infinity, a quiet NaN, signalling ones and full payloads.
HOSTILE = [sign | bits for sign in (0, 0x8000) for bits in
           (0, 1, 0x3FF, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7C01, 0x7DFF, 0x7FFF)]  # fmt: skip
# Squared error of rounding normal weights, by their square. Three levels lose 0.19 at best (Lloyd and Max); scales that
# are powers of two cost MXFP4 a factor; elsewhere an even grid in groups of 16 or 32 loses 1.0 to 1.7 times 4**-bits.
LARGEST_ERROR = {"TQ2_0": 0.2, "MXFP4": 0.02}
TYPES = list(BLOCK_TYPES.values())
every_type = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: str(kind.name))


def random_blocks(kind: BlockType, rows: int, blocks: int = 1) -> Tensor:
    return torch.randint(0, 256, (rows, blocks * kind.size_bytes), dtype=torch.uint8)


def columns_of(kind: BlockType, packed: Tensor) -> int:
    return packed.shape[1] // kind.size_bytes * kind.weights


def assert_read_alike(kind: BlockType, packed: Tensor) -> QuantizedWeight:
    """Decoded to the bits that the gguf package gives, a NaN where it gives one, and packed to the same bytes."""
    weight = kind.unpack(packed, columns_of(kind, packed))
    with np.errstate(all="ignore"):
        expected = dequantize(packed.numpy(), GGMLQuantizationType[kind.name])
    found = weight.dequantize().numpy()
    assert found.dtype == expected.dtype == np.float32
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(found.view(np.int32)[numbers], expected.view(np.int32)[numbers])
    assert torch.equal(kind.pack(weight), packed)
    return weight


# ---- every bit


@every_type
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_decode_as_in_gguf_and_come_back(kind: BlockType, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.binary(min_size=kind.size_bytes, max_size=kind.size_bytes), min_size=1, max_size=3))
    assert_read_alike(kind, torch.tensor([list(row) for row in rows], dtype=torch.uint8))


@every_type
def test_random_blocks_decode_as_in_gguf_and_come_back(kind: BlockType) -> None:
    assert_read_alike(kind, random_blocks(kind, 40, 3))


@every_type
def test_no_bit_is_lost_or_moved(kind: BlockType) -> None:
    """Packing and unpacking move and flip single bits, so that these blocks stand for all."""
    bits = torch.eye(8 * kind.size_bytes, dtype=torch.int64).reshape(-1, kind.size_bytes, 8)
    one_each = (bits << torch.arange(8)).sum(-1).to(torch.uint8)
    none, rest = torch.zeros(1, kind.size_bytes, dtype=torch.uint8), 255 - one_each
    for packed in (none, one_each, rest):
        assert torch.equal(kind.pack(kind.unpack(packed, kind.weights)), packed)


def hostile_blocks(kind: BlockType) -> Iterator[Tensor]:
    """Blocks of random bytes with each pair of hostile numbers where the type has its halves."""
    places = HALVES[kind.name]
    for index, number in enumerate(HOSTILE):
        packed = random_blocks(kind, len(HOSTILE))
        for place, numbers in zip(places, ([number] * len(HOSTILE), HOSTILE), strict=False):
            packed[:, place : place + 2] = torch.tensor(numbers).to(torch.int16)[:, None].view(torch.uint8)
        if index % 2:
            # Codes and scales of all ends.
            rest = [place for place in range(kind.size_bytes) if not {place, place - 1} & set(places)]
            packed[:, rest] = 255 * (torch.arange(len(HOSTILE), dtype=torch.uint8)[:, None] % 2)
        yield packed


@every_type
def test_infinities_subnormals_and_nan_decode_as_in_gguf_and_come_back(kind: BlockType) -> None:
    for packed in hostile_blocks(kind):
        assert_read_alike(kind, packed)


@pytest.mark.parametrize("name", [name for name, places in HALVES.items() if places])
def test_every_float16_comes_back_with_all_its_bits(name: str) -> None:
    kind = BLOCK_TYPES[name]
    for place in HALVES[name]:
        packed = random_blocks(kind, 2**16)
        packed[:, place : place + 2] = torch.arange(2**16).to(torch.int16)[:, None].view(torch.uint8)
        assert torch.equal(kind.pack(kind.unpack(packed, kind.weights)), packed)


def test_every_scale_and_code_of_mxfp4_decodes_as_in_gguf() -> None:
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = torch.arange(16, dtype=torch.uint8)
    packed = torch.cat([scales, (codes | (15 - codes) << 4).expand(256, -1)], dim=1)
    weight = assert_read_alike(BLOCK_TYPES["MXFP4"], packed.contiguous())
    # Not the NaN of the OCP format: 2**128 times 0, 0.5 and 1.
    assert weight.dequantize()[255, :3].tolist() == [0.0, 2.0**127, float("inf")]
    assert weight.dequantize()[:2, 1].tolist() == [2.0**-128, 2.0**-127]


def test_the_fourth_code_of_tq2_0_is_2() -> None:
    packed = torch.full((1, 66), 0b11_10_01_00, dtype=torch.uint8)
    packed[:, 64:] = torch.tensor([0x00, 0x3C], dtype=torch.uint8)
    decoded = assert_read_alike(BLOCK_TYPES["TQ2_0"], packed).dequantize().reshape(2, 4, 32)
    assert decoded[:, :, 0].tolist() == [[-1.0, 0.0, 1.0, 2.0]] * 2


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_minima_are_negated_offsets(name: str) -> None:
    kind = BLOCK_TYPES[name]
    packed = torch.zeros(1, kind.size_bytes, dtype=torch.uint8)
    packed[0, 2:4] = torch.tensor([1.5]).half().view(torch.uint8)
    weight = kind.unpack(packed, 32)
    assert weight.offsets is not None
    assert weight.offsets.tolist() == [[-1.5]]
    assert weight.dequantize().unique().tolist() == [1.5]


# ---- names, numbers and sizes


def test_each_type_is_its_scheme_and_that_has_its_name() -> None:
    assert SCHEMES.keys() == BLOCK_TYPES.keys()
    for name, kind in BLOCK_TYPES.items():
        word = "mxfp4_ggml" if name == "MXFP4" else name.lower()
        assert kind.name == name
        assert kind.scheme == parse_scheme(SCHEMES[name]) == parse_scheme(word)
        assert kind.scheme.name == word
        assert kind.scheme.arithmetic == torch.float32
        assert block_type_of(kind.scheme) is kind
    assert len({kind.scheme for kind in TYPES}) == len({kind.number for kind in TYPES}) == len(TYPES)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-f16", "q4_0-f16", "mxfp4", "int4-g64-f16-f32"])
def test_schemes_that_ggml_reads_otherwise_or_not_at_all_have_no_type(name: str) -> None:
    scheme = parse_scheme("int4-g32-f16" if name == "q4_0-f16" else name)
    assert block_type_of(scheme) is None


@pytest.mark.parametrize(("name", "number"), [("Q4_0", 2), ("Q8_0", 8), ("Q2_K", 10), ("Q6_K", 14), ("MXFP4", 39)])
def test_numbers_are_those_of_ggml(name: str, number: int) -> None:
    assert BLOCK_TYPES[name].number == number


def test_floats_have_their_numbers_and_types() -> None:
    found = {name: (kind.name, kind.number, kind.dtype) for name, kind in FLOAT_TYPES.items()}
    assert found == {
        "F32": ("F32", 0, torch.float32),
        "F16": ("F16", 1, torch.float16),
        "BF16": ("BF16", 30, torch.bfloat16),
    }


@every_type
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 2), (0, 2), (2, 0)])
def test_what_is_written_has_the_size_that_the_scheme_predicts(kind: BlockType, rows: int, blocks: int) -> None:
    packed = random_blocks(kind, rows, blocks)
    shape = (rows, blocks * kind.weights)
    weight = kind.unpack(packed, shape[1])
    assert weight.shape == shape
    again = kind.pack(weight)
    assert torch.equal(again, packed)
    assert again.numel() * 8 == kind.scheme.storage_bits(shape)


# ---- rows, chunks and what comes from a solver


@every_type
def test_rows_stand_by_themselves_whatever_the_chunk(kind: BlockType) -> None:
    packed = random_blocks(kind, 3, 150_000 // kind.weights)
    columns = columns_of(kind, packed)
    weight = kind.unpack(packed, columns)
    for row in range(3):
        one = slice(row, row + 1)
        alone = kind.unpack(packed[one], columns)
        assert torch.equal(alone.codes, weight.codes[one])
        assert torch.equal(kind.pack(weight.rows(one)), packed[one])
    assert torch.equal(kind.pack(weight), packed)


@every_type
def test_strided_tensors_are_taken_and_nothing_is_edited(kind: BlockType) -> None:
    packed = random_blocks(kind, 6, 2)
    before = packed.clone()
    weight = kind.unpack(packed[::2], 2 * kind.weights)
    kept = weight.codes.clone()
    assert torch.equal(kind.pack(weight), packed[::2])
    assert torch.equal(kind.pack(weight.rows(slice(None, None, 2))), packed[::4])
    assert torch.equal(packed, before)
    assert torch.equal(weight.codes, kept)


@every_type
def test_a_solved_weight_is_read_by_gguf_as_it_decodes(kind: BlockType) -> None:
    w = torch.randn(5, 512) * 0.05
    w[0, :256] = 0
    w[1, :256] = w[1, 0]
    weight = Nearest().solve(w, kind.scheme, Statistics()).weight
    read = dequantize(kind.pack(weight).numpy(), GGMLQuantizationType[kind.name])
    assert np.array_equal(read, weight.dequantize().numpy())
    error = (torch.from_numpy(read) - w).square().mean() / w.square().mean()
    assert error < LARGEST_ERROR.get(kind.name, 1.8 * 4.0**-kind.scheme.element.bits)


def test_ggmls_mxfp4_gets_the_codes_and_scales_of_the_ocp_format() -> None:
    w = torch.randn(64, 256) * torch.logspace(-6, 6, 64)[:, None]
    ours, ocp = (Nearest().solve(w, parse_scheme(name), Statistics()).weight for name in ("mxfp4_ggml", "mxfp4"))
    assert torch.equal(ours.codes, ocp.codes)
    assert torch.equal(ours.scales, ocp.scales)
    assert torch.equal(ours.dequantize(), ocp.dequantize())


# ---- errors


@every_type
def test_another_scheme_is_refused(kind: BlockType) -> None:
    other = Nearest().solve(torch.randn(2, 256), parse_scheme("int4-g32-f16"), Statistics()).weight
    with pytest.raises(UsageError, match=rf"int4-g32-f16 given; {kind.name} holds {kind.scheme} only"):
        kind.pack(other)


@every_type
def test_bytes_that_do_not_fit_are_refused(kind: BlockType) -> None:
    packed = random_blocks(kind, 2, 2)
    with pytest.raises(
        ShapeError, match=f"{kind.weights + 1} columns do not come out even in blocks of {kind.weights}"
    ):
        kind.unpack(packed, kind.weights + 1)
    for wrong in (packed[:, :-1], packed[0], packed.to(torch.int16)):
        with pytest.raises(ShapeError, match=f"expected a matrix of uint8 with {2 * kind.size_bytes} bytes a row"):
            kind.unpack(wrong, 2 * kind.weights)
