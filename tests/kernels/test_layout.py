"""The bytes of packed weights: where each code lies, what the header says, and that no damaged one is read."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.errors import CheckpointError, ShapeError
from pennyweight.formats.integer import Int
from pennyweight.kernels.layout import Layout, codes_of, layout_group, planes_of, stored_bits
from pennyweight.kernels.native import native
from pennyweight.kernels.packed import PackedMatrix, multiply
from tests.kernels.packed_cases import FORMATS, TYPES, Case, weight_of

library = native()
GROUPS = st.integers(1, 8).map(lambda n: 16 * n)
ZEROS = ("none", "integer", "float", "offset")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    table_bits = draw(st.sampled_from([0, 0, 4, 8]))
    group = draw(GROUPS)
    bits = stored_bits(draw(st.integers(2, 4 if table_bits == 4 else 8)), group)
    zero = draw(st.sampled_from([kind for kind in ZEROS if not (table_bits and kind == "integer")]))
    smallest = 0.0 if table_bits else draw(st.sampled_from([0.0, -(2.0 ** (bits - 1))]))
    shape = draw(st.integers(1, 70)), draw(st.integers(1, 600))
    return Layout(*shape, bits, group, draw(st.sampled_from(TYPES)), zero, smallest, table_bits, unit=0.25)  # type: ignore[arg-type]


def textbook(codes: Tensor, layout: Layout) -> list[bytes]:
    """The bytes of each tile, one code at a time, as the module describes them."""
    low = {3: 2, 5: 4, 6: 4}.get(layout.bits, layout.bits)
    columns = 32 if layout.group % 32 == 0 else 16
    tiles = []
    for first in range(0, codes.shape[0], 16):
        tile = bytearray(layout.code_bytes)
        for row, numbers in enumerate(codes[first : first + 16].tolist()):
            for column, code in enumerate(numbers):
                start = column // columns * (columns * 2 * layout.bits)
                quad, byte = column % columns // 4, 4 * row + column % 4
                for bits, shift in ((low, 0), (layout.bits - low, low)):
                    if bits:
                        field = (code >> shift & (1 << bits) - 1) << quad % (8 // bits) * bits
                        tile[start + quad // (8 // bits) * 64 + byte] |= field
                    start += columns * 2 * bits
        tiles.append(bytes(tile))
    return tiles


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), group=GROUPS, tiles=st.integers(1, 2), groups=st.integers(1, 3), seed=st.integers(0, 9))
def test_codes_lie_where_the_description_says_and_come_back(
    bits: int, group: int, tiles: int, groups: int, seed: int
) -> None:
    bits = stored_bits(bits, group)
    layout = Layout(16 * tiles, groups * group, bits, group, torch.float32, "none")
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (16 * tiles, groups * group), dtype=torch.uint8, generator=generator)
    packed = planes_of(codes, layout)
    assert [bytes(tile.tolist()) for tile in packed] == textbook(codes, layout)
    assert torch.equal(codes_of(packed, layout), codes)


# ---- sizes and the header


@settings(max_examples=100, deadline=None)
@given(layout=layouts())
def test_the_header_says_all_and_the_sizes_add_up(layout: Layout) -> None:
    head = layout.header()
    assert head[:8] == b"PWPACKED"
    assert struct.unpack("<IIBBBBHHffQ", head[8:40]) == (
        layout.rows, layout.cols, layout.bits, TYPES.index(layout.scale), ZEROS.index(layout.zero), layout.table_bits,
        layout.group, 16, layout.smallest, layout.unit, layout.size_bytes,
    )  # fmt: skip
    assert head[40:60] == bytes(20)
    assert struct.unpack("<I", head[60:]) == (zlib.crc32(head[:60]),)
    groups, tiles = -(-layout.cols // layout.group), -(-layout.rows // 16)
    wide = 4 if layout.scale == torch.float32 else 2
    scales, bytes_of_zeros = -(-groups * 16 * wide // 64) * 64, -(-groups * 16 // 64) * 64
    zeros = {"none": 0, "integer": bytes_of_zeros}.get(layout.zero, scales)
    table = {0: 0, 4: 64, 8: 1024}[layout.table_bits]
    assert layout.size_bytes == 64 + table + tiles * (groups * layout.group * 2 * layout.bits + scales + zeros)
    assert Layout.parse(_storage(layout)) == layout


@pytest.mark.parametrize("name", ["int3", "uint7", "nf4", "ternary", "fp8_e4m3"])
@pytest.mark.parametrize("case", [Case(33, 96, 16, "float"), Case(5, 100, 100), Case(20, 512, 256, "offset")])
def test_the_size_is_known_before_the_bytes(name: str, case: Case) -> None:
    packed = weight_of(name, case).packed
    assert packed.storage.numel() == packed.layout.size_bytes
    assert PackedMatrix.open(packed.storage).layout == packed.layout


@settings(max_examples=200, deadline=None)
@given(groups=st.integers(1, 9), group=st.integers(1, 600))
def test_groups_of_the_layout_are_whole_in_those_of_the_weight(groups: int, group: int) -> None:
    size = layout_group(group, groups * group)
    if size is None:
        assert groups > 1
        assert group % 16 != 0
        return
    assert 16 <= size <= 128
    assert size % 16 == 0
    # One group a row may be filled up, by less than a group.
    assert group % size == 0 or groups == 1


# ---- what was packed comes back


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"e8m0", "e8m0_halved", "fp8_e4m3", "fp8_e5m2", "nf4"}))
@pytest.mark.parametrize("scale", TYPES)
def test_decoding_gives_the_weights(name: str, scale: torch.dtype) -> None:
    for zero in ("none", "integer") if isinstance(FORMATS[name], Int) else ("none",):
        for rows, cols, group in ((33, 96, 16), (300, 64, 64), (5, 100, 100), (20, 512, 256)):
            weight = weight_of(name, Case(rows, cols, group, zero, scale, unit=0.5, power_of_two=True))
            decoded = weight.packed.decode()
            assert torch.equal(decoded.double(), weight.dense)
            for some in (slice(1, 4), slice(3, None, 2), torch.tensor([rows - 1, 0, 2, 2])):
                assert torch.equal(weight.packed.decode(some), decoded[some])


def test_scales_are_kept_in_the_narrowest_type_that_holds_them() -> None:
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    for scale, kind in (
        (1.0, torch.bfloat16),
        (2.0**100, torch.bfloat16),
        (1 + 2**-10, torch.float16),
        (1.1, TYPES[0]),
    ):
        packed = PackedMatrix.pack(codes, torch.full((16, 2), scale), element=Int(4))
        assert packed.layout.scale == kind
        both = PackedMatrix.pack(
            codes, torch.full((16, 2), scale), element=Int(4), offsets=torch.full((16, 2), 1 + 2**-10)
        )
        assert both.layout.scale in (torch.float16, torch.float32)


def test_what_cannot_be_packed_is_refused() -> None:
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    for wrong, scales in ((codes.float(), torch.ones(16, 2)), (codes, torch.ones(2)), (codes[0], torch.ones(16, 2))):
        with pytest.raises(ShapeError, match="cannot be packed"):
            PackedMatrix.pack(wrong, scales, element=Int(4))
    for wrong, groups in ((codes, 3), (codes, 8), (codes, 0), (codes[:0], 2)):
        with pytest.raises(ShapeError, match="multiple of 16|not equal"):
            PackedMatrix.pack(wrong, torch.ones(wrong.shape[0], groups), element=Int(4))


# ---- damage


def _storage(layout: Layout) -> Tensor:
    storage = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    storage[:64] = torch.tensor(list(layout.header()), dtype=torch.uint8)
    return storage


def _is_parsed(storage: Tensor) -> bool:
    try:
        Layout.parse(storage)
    except CheckpointError:
        return False
    return True


def _is_read(storage: Tensor) -> bool:
    assert library is not None
    try:
        library.Packed(storage)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("byte", range(64))
def test_every_damaged_byte_of_the_header_is_noticed(byte: int) -> None:
    storage = weight_of("int4", Case(20, 64, 32)).packed.storage.clone()
    for bit in range(8):
        storage[byte] ^= 1 << bit
        with pytest.raises(CheckpointError, match=r"here\.0: .*pack them again"):
            PackedMatrix.open(storage, "here.0")
        storage[byte] ^= 1 << bit
    assert _is_parsed(storage)


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_missing_bytes_are_noticed(name: str) -> None:
    storage = weight_of(name, Case(20, 64, 32)).packed.storage
    for count in (0, 1, 8, 63, 64, 65, 127, 128, 200, storage.numel() - 64, storage.numel() - 1):
        assert not _is_parsed(storage[:count])
        assert library is None or not _is_read(storage[:count])
    longer = torch.cat([storage, storage[:64]])
    assert not _is_parsed(longer)
    assert library is None or not _is_read(longer)


@pytest.mark.skipif(library is None, reason="the native library is not built")
@settings(max_examples=300, deadline=None)
@given(layout=layouts(), changes=st.lists(st.tuples(st.integers(8, 31), st.integers(0, 255)), min_size=1, max_size=3))
def test_both_readers_take_the_same_headers(layout: Layout, changes: list[tuple[int, int]]) -> None:
    head = bytearray(layout.header())
    for at, value in changes:
        head[at] = value
    storage = _storage(layout)
    # First with the size that there is, then with the one that such a header asks for.
    for _ in range(2):
        head[32:40] = struct.pack("<Q", storage.numel())
        head[60:] = struct.pack("<I", zlib.crc32(head[:60]))
        storage[:64] = torch.tensor(list(head), dtype=torch.uint8)
        assert _is_parsed(storage) == _is_read(storage)
        if _is_parsed(storage):
            matrix = PackedMatrix.open(storage)
            assert multiply(torch.ones(2, matrix.shape[1]), [matrix])[0].shape == (2, matrix.shape[0])
        rows, cols, bits, scale, zero, table_bits, group = struct.unpack("<IIBBBBH", head[8:22])
        if bits not in (2, 3, 4, 5, 6, 8) or scale > 2 or zero > 3 or group == 0 or rows * cols > 10**5:
            return
        asked = replace(layout, rows=rows, cols=cols, bits=bits, scale=TYPES[scale], zero=ZEROS[zero], group=group)  # type: ignore[arg-type]
        storage = torch.zeros(replace(asked, table_bits=min(table_bits, 8)).size_bytes, dtype=torch.uint8)


@pytest.mark.skipif(library is None, reason="the native library is not built")
def test_sizes_beyond_64_bits_are_refused() -> None:
    # 2**28 tiles of 2**36 bytes: their product is 0 in 64 bits, which would be the size of a header alone.
    head = b"PWPACKED" + struct.pack("<IIBBBBHHff", 2**32 - 1, 2**32 - 1, 6, 0, 0, 0, 16, 16, -32.0, 1.0)
    assert not _is_read(torch.tensor(list(head.ljust(64, b"\0")), dtype=torch.uint8))
