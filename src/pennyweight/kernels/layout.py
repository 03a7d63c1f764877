"""The layout of packed weights: sixteen rows of a matrix side by side, their codes in planes of bits.

    header     64 bytes, see `Layout.header`
    table      float32 values of all codes, 2**4 or 2**8 of them; only for number formats that are no integers
    tiles      of 16 rows each, one after the other; the last one is filled up with rows of zeros:
      codes    of all columns, filled up to whole groups
      scales   [groups, 16] float32, bfloat16 or float16
      zeros    [groups, 16] uint8 (code of the zero point), or zero points or offsets like the scales; or nothing

Each of the last three begins at a multiple of 64 bytes. Columns come in chunks of 32, or of 16 where the group size is
no multiple of 32; a chunk in quads of 4 columns. A vector is the 64 bytes of a quad, one byte a code, that of row r and
column j at 4 r + j: what an instruction that adds four products of bytes to an integer takes. A plane of n bits holds
8 / n quads in one vector, the first one in the lowest bits. Codes of 2, 4 and 8 bits are one plane, those of 3, 5 and 6
bits a plane of 2 or 4 low bits and after it, chunk by chunk, one of the bits above. Since a plane of one bit needs
eight quads, codes of 3 and 5 bits take 4 and 6 where chunks have 16 columns.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError, ShapeError, UsageError

MAGIC = b"PWPACKED"
HEADER_BYTES = 64
TILE_ROWS = 16
# The largest group: sums of products of 8-bit codes and 8-bit activations stay exact in every kernel.
LARGEST_GROUP = 128
_HEADER = struct.Struct("<8sIIBBBBHHffQ20xI")
_ALIGNMENT = 64
# Bits of a code -> bits of its planes, low ones first.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_ZEROS: tuple[Zero, ...]

Zero = Literal["none", "integer", "float", "offset"]
_ZEROS = ("none", "integer", "float", "offset")


@dataclass(frozen=True)
class Layout:
    """What the header says.

    rows, cols   of the matrix
    bits         of a stored code
    group        columns that share a scale, a multiple of 16
    scale        type of scales, and of zero points and offsets that are floats
    zero         weight = unit * scale * value; "integer": unit * scale * (code - zero); "float": unit * scale *
                 (value - zero); "offset": unit * (scale * value - offset)
    smallest     value of code 0, where values are whole numbers one apart
    table_bits   0 for whole numbers; else the table has 2**table_bits values
    unit         of the whole matrix
    """

    rows: int
    cols: int
    bits: int
    group: int
    scale: torch.dtype
    zero: Zero
    smallest: float = 0.0
    table_bits: int = 0
    unit: float = 1.0

    @cached_property
    def tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @cached_property
    def groups(self) -> int:
        return -(-self.cols // self.group)

    @cached_property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return 16 if self.group % 32 else 32

    @property
    def planes(self) -> tuple[int, ...]:
        return _PLANES[self.bits]

    @cached_property
    def code_bytes(self) -> int:
        """Of a tile."""
        return self.groups * self.group * TILE_ROWS * self.bits // 8

    @cached_property
    def scale_bytes(self) -> int:
        """Of a tile, filled up."""
        return _aligned(self.groups * TILE_ROWS * self.scale.itemsize)

    @cached_property
    def zero_bytes(self) -> int:
        """Of a tile, filled up."""
        match self.zero:
            case "none":
                return 0
            case "integer":
                return _aligned(self.groups * TILE_ROWS)
            case _:
                return self.scale_bytes

    @property
    def tile_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes + self.zero_bytes

    @property
    def table_bytes(self) -> int:
        return 4 * 2**self.table_bits if self.table_bits else 0

    @property
    def size_bytes(self) -> int:
        return HEADER_BYTES + self.table_bytes + self.tiles * self.tile_bytes

    def header(self) -> bytes:
        """64 bytes, little-endian: magic; rows, cols; bits, kind of scale, kind of zero, table_bits; group, rows of a
        tile; smallest, unit; bytes in all; 20 zeros; CRC-32 of all that."""
        kinds = _SCALES.index(self.scale), _ZEROS.index(self.zero)
        fields = (MAGIC, self.rows, self.cols, self.bits, *kinds, self.table_bits, self.group, TILE_ROWS)
        head = _HEADER.pack(*fields, self.smallest, self.unit, self.size_bytes, 0)[:-4]
        return head + struct.pack("<I", zlib.crc32(head))

    @staticmethod
    def parse(storage: Tensor, name: str = "packed weights") -> Layout:
        """What the header of `storage`, uint8 [bytes], says; raises CheckpointError where it is not whole."""
        head = bytes(storage[:HEADER_BYTES].tolist())
        if len(head) < HEADER_BYTES or head[:8] != MAGIC or struct.unpack("<I", head[-4:])[0] != zlib.crc32(head[:-4]):
            raise CheckpointError(f"{name}: this is no header of packed weights, or a damaged one: pack them again")
        _, rows, cols, bits, scale, zero, table_bits, group, tile_rows, smallest, unit, size, _ = _HEADER.unpack(head)
        is_known = bits in _PLANES and scale < len(_SCALES) and zero < len(_ZEROS) and tile_rows == TILE_ROWS
        has_groups = is_known and 16 <= group <= LARGEST_GROUP and group % 16 == 0 and stored_bits(bits, group) == bits
        has_table = table_bits == 8 or (table_bits == 4 and bits <= 4)
        # Of whole numbers only: zero points that are codes, and the value of code 0, by which sums are multiplied.
        is_code = abs(smallest) <= 128 and smallest % 1 == 0 if table_bits == 0 else smallest == 0 and zero != 1
        if not (has_groups and is_code and (has_table or table_bits == 0) and rows and cols):
            raise CheckpointError(f"{name}: packed by another version of Pennyweight: pack them again")
        layout = Layout(rows, cols, bits, group, _SCALES[scale], _ZEROS[zero], smallest, table_bits, unit)
        if size != layout.size_bytes or storage.numel() != size:
            raise CheckpointError(f"{name}: {storage.numel()} bytes of {layout.size_bytes}: pack them again")
        return layout


def layout_group(group: int, cols: int) -> int | None:
    """Columns that share a scale in the layout where `group` share one in the weight; None where there is no layout.

    Larger groups than LARGEST_GROUP are cut into equal ones that repeat the scale. One group a row is filled up.

    >>> layout_group(64, 4096), layout_group(4096, 4096), layout_group(100, 100), layout_group(24, 48)
    (64, 128, 128, None)
    """
    sizes = [size for size in (128, 96, 64, 32, 112, 80, 48, 16) if size <= group or group >= cols]
    whole = [size for size in sizes if group % size == 0]
    if whole:
        return whole[0]
    if group < cols:
        return None
    return min((-(-cols // size) * size, -size) for size in (128, 64, 32))[1] * -1


def stored_bits(bits: int, group: int) -> int:
    """Bits that the layout gives to codes of `bits` bits in groups of `group`."""
    if not 1 <= bits <= 8:
        raise UsageError(f"codes of {bits} bits cannot be packed: give 1 to 8")
    narrow = {1: 2, 7: 8}.get(bits, bits)
    return {3: 4, 5: 6}.get(narrow, narrow) if group % 32 else narrow


def planes_of(codes: Tensor, layout: Layout) -> Tensor:
    """uint8 codes [tiles * 16, groups * group] as the bytes [tiles, code_bytes] of the layout."""
    chunk, tiles = layout.chunk, codes.shape[0] // TILE_ROWS
    quads = codes.view(tiles, TILE_ROWS, -1, chunk // 4, 4).permute(0, 2, 3, 1, 4)
    quads = quads.reshape(tiles, -1, chunk // 4, 64)
    planes, low = [], 0
    for bits in layout.planes:
        fields = ((quads >> low) & (2**bits - 1)).view(tiles, quads.shape[1], -1, 8 // bits, 64)
        plane = torch.zeros_like(fields[..., 0, :])
        for index in range(8 // bits):
            plane |= fields[..., index, :] << (index * bits)
        planes.append(plane.flatten(2))
        low += bits
    return torch.cat(planes, dim=2).view(tiles, -1)


def codes_of(packed: Tensor, layout: Layout) -> Tensor:
    """The inverse of `planes_of`: uint8 codes [tiles * 16, groups * group] of bytes [tiles, code_bytes]."""
    quads, tiles = layout.chunk // 4, packed.shape[0]
    chunks = packed.view(tiles, -1, quads * 8 * layout.bits)
    codes, low, start = packed.new_zeros(tiles, chunks.shape[1], quads, 64), 0, 0
    for bits in layout.planes:
        length = quads * 8 * bits
        plane = chunks[..., start : start + length].reshape(tiles, chunks.shape[1], -1, 1, 64)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
        codes |= ((plane >> shifts) & (2**bits - 1)).view_as(codes) << low
        low, start = low + bits, start + length
    rows = codes.view(tiles, -1, quads, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
    return rows.reshape(tiles * TILE_ROWS, -1)


def check_matrix(codes: Tensor, scales: Tensor) -> None:
    """Raises ShapeError where `codes` is no uint8 matrix or `scales` no matrix."""
    if codes.dtype != torch.uint8 or codes.ndim != 2 or scales.ndim != 2:
        raise ShapeError(
            f"codes {codes.dtype} {tuple(codes.shape)} and scales {tuple(scales.shape)} cannot be packed: "
            "give uint8 codes [rows, cols] and scales [rows, groups]"
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
