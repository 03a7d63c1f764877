"""Packed weights: codes of 2 to 8 bits in the order in which a kernel reads them, and products with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError, UsageError, WeightError
from pennyweight.core.parallel import allowed_threads, chunks, parallel_map
from pennyweight.formats import NumberFormat
from pennyweight.formats.integer import Int
from pennyweight.kernels.layout import (
    HEADER_BYTES,
    TILE_ROWS,
    Layout,
    Zero,
    check_matrix,
    codes_of,
    layout_group,
    planes_of,
    stored_bits,
)  # fmt: skip
from pennyweight.kernels.memory import room
from pennyweight.kernels.native import library_and_table, native

# "exact": products of decoded weights, added in float32. "int8": activations are rounded to 8 bits first.
Activations = Literal["exact", "int8"]
# Tiles that are packed or decoded at a time.
_TILES = 16
# Groups of activations whose numbers are all this small count as zeros: their scales would have no inverse.
_SMALLEST_SCALE = 1e-30
_NATIVE_INPUTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class PackedMatrix:
    """A quantized weight [rows, cols] as bytes of `kernels.layout`; `storage` is uint8 [bytes], contiguous."""

    layout: Layout
    storage: Tensor

    @staticmethod
    def open(storage: Tensor, name: str = "packed weights") -> PackedMatrix:
        """Bytes that `pack` made; raises CheckpointError where the header is damaged or bytes are missing. Bytes in the
        middle of others, where no float can begin, are copied."""
        layout = Layout.parse(storage, name)
        return PackedMatrix(layout, storage.clone() if storage.storage_offset() % 4 else storage)

    @staticmethod
    def why_not(rows: int, cols: int, *, group: int) -> str | None:
        """Why weights [rows, cols] with `group` columns a scale cannot be packed; None if they can."""
        if rows and cols and layout_group(group, cols) is not None:
            return None
        return f"{group} of {cols} columns share a scale: kernels take whole groups of a multiple of 16 columns"

    @staticmethod
    def pack(
        codes: Tensor, scales: Tensor, *, element: NumberFormat, zeros: Tensor | None = None,
        offsets: Tensor | None = None, unit: float = 1.0,
    ) -> PackedMatrix:  # fmt: skip
        """weight = unit * scale * (value(code) - zero), or unit * (scale * value(code) - offset).

        codes           uint8 [rows, cols]
        scales          [rows, groups], or one of both; groups are of the same size. Kept in the narrowest type that
                        holds them exactly
        zeros, offsets  like scales, one of them at most; zeros of an integer type are kept as codes where they are some
        Raises ShapeError where shapes do not fit (see `why_not`), WeightError for codes of no finite value.
        """
        check_matrix(codes, scales)
        rows, cols = codes.shape
        shape = (rows, scales.shape[1])
        given = [x.expand(shape) for x in (scales, zeros, offsets) if x is not None]
        group = cols // max(shape[1], 1)
        if (why := PackedMatrix.why_not(rows, cols, group=group)) or group * shape[1] != cols:
            raise ShapeError(f"codes {tuple(codes.shape)}, {shape[1]} scales a row: {why or 'groups are not equal'}")
        size = layout_group(group, cols)
        assert size is not None
        is_integer = zeros is not None and _are_codes(zeros, element)
        floats = given[:1] if is_integer else given
        kind: Zero = "offset" if offsets is not None else "none" if zeros is None else "float"
        layout = Layout(
            rows, cols, stored_bits(element.bits, size), size, _narrowest(floats), "integer" if is_integer else kind,
            smallest=element.smallest if isinstance(element, Int) else 0.0,
            table_bits=0 if isinstance(element, Int) else 4 if element.bits <= 4 else 8, unit=unit,
        )  # fmt: skip
        storage = room(layout.size_bytes)
        storage[:HEADER_BYTES] = torch.frombuffer(bytearray(layout.header()), dtype=torch.uint8)
        matrix = PackedMatrix(layout, storage)
        if layout.table_bits:
            values = element.decode(torch.arange(2**element.bits, dtype=torch.uint8))
            matrix.table[: len(values)] = values
            if torch.isin(codes, (~values.isfinite()).nonzero().flatten().to(torch.uint8)).any():
                raise WeightError(f"codes {tuple(codes.shape)} of {element.name}: infinity or NaN is among the weights")
        parallel_map(lambda part: matrix._pack_tiles(part, codes, given), chunks(layout.tiles, _TILES))
        return matrix

    @property
    def shape(self) -> tuple[int, int]:
        return (self.layout.rows, self.layout.cols)

    @property
    def table(self) -> Tensor:
        """float32 values of all codes; empty for whole numbers."""
        return self.storage[HEADER_BYTES : HEADER_BYTES + self.layout.table_bytes].view(torch.float32)

    @cached_property
    def native(self) -> Any:
        """What the native library knows of it."""
        library = native()
        assert library is not None
        return library.Packed(self.storage)

    @property
    def _tiles(self) -> Tensor:
        """uint8 [tiles, tile_bytes]."""
        return self.storage[HEADER_BYTES + self.layout.table_bytes :].view(self.layout.tiles, -1)

    def _fields(self, tiles: Tensor) -> list[Tensor]:
        """Codes [tiles, bytes], scales and zeros [tiles, groups, 16] of some `tiles`; zeros only where there are some.
        Views where the tiles follow each other."""
        layout = self.layout
        count = layout.groups * TILE_ROWS
        end = layout.code_bytes + layout.scale_bytes
        fields = [tiles[:, : layout.code_bytes]]
        fields.append(tiles[:, layout.code_bytes : end][:, : count * layout.scale.itemsize].view(layout.scale))
        if layout.zero != "none":
            kind = torch.uint8 if layout.zero == "integer" else layout.scale
            fields.append(tiles[:, end:][:, : count * kind.itemsize].view(kind))
        return [fields[0], *(field.view(-1, layout.groups, TILE_ROWS) for field in fields[1:])]

    def _pack_tiles(self, part: slice, codes: Tensor, given: Sequence[Tensor]) -> None:
        layout = self.layout
        rows = slice(TILE_ROWS * part.start, TILE_ROWS * part.stop)
        below = TILE_ROWS * (part.stop - part.start) - codes[rows].shape[0]
        aside = layout.groups * layout.group - layout.cols
        padded = torch.nn.functional.pad(codes[rows], (0, aside, 0, below))
        fields = self._fields(self._tiles[part])
        fields[0].copy_(planes_of(padded.contiguous(), layout))
        for field, x in zip(fields[1:], given, strict=True):
            wide = x[rows].repeat_interleave(-(-layout.groups // x.shape[1]), dim=1)
            if not field.is_floating_point():
                wide = wide - int(layout.smallest)
            tall = torch.nn.functional.pad(wide, (0, 0, 0, below))
            field.copy_(tall.view(-1, TILE_ROWS, layout.groups).transpose(1, 2))

    def decode(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """float32 [rows, cols] of the rows that are named, computed in float32. The plain version of every kernel."""
        if isinstance(rows, Tensor):
            tiles, place = torch.unique(rows // TILE_ROWS, return_inverse=True)
            return self._decode_tiles(self._tiles[tiles])[place * TILE_ROWS + rows % TILE_ROWS]
        start, stop, step = rows.indices(self.layout.rows)
        out = torch.empty(max(stop - start, 0), self.layout.cols, device=self.storage.device)
        first = start // TILE_ROWS

        def one(part: slice) -> None:
            decoded = self._decode_tiles(self._tiles[first + part.start : first + part.stop])
            at = (first + part.start) * TILE_ROWS
            upper, lower = max(at, start), min(at + decoded.shape[0], stop)
            out[upper - start : lower - start] = decoded[upper - at : lower - at]

        parallel_map(one, chunks(-(-max(stop, start) // TILE_ROWS) - first, _TILES))
        return out[::step]

    def _decode_tiles(self, tiles: Tensor) -> Tensor:
        layout = self.layout
        packed, scales, *zeros = self._fields(tiles)
        codes = codes_of(packed, layout)
        values = torch.take(self.table, codes.long()) if layout.table_bits else codes.float()
        values = values.view(-1, layout.groups, layout.group)
        if layout.zero != "integer":
            values += layout.smallest
        scale, *zero = (x.float().transpose(1, 2).reshape(-1, layout.groups, 1) for x in (scales, *zeros))
        match layout.zero:
            case "none":
                values *= scale
            case "offset":
                values = values.mul_(scale).sub_(zero[0])
            case _:
                values = values.sub_(zero[0]).mul_(scale)
        return values.mul_(layout.unit).view(-1, layout.groups * layout.group)[:, : layout.cols]


def multiply(
    x: Tensor, matrices: Sequence[PackedMatrix], *, biases: Sequence[Tensor | None] | None = None,
    activations: Activations = "exact",
) -> list[Tensor]:  # fmt: skip
    """x @ W.T + bias for each of several weights that share the input `x` [..., cols]; in the type of `x`.

    "exact": products with the decoded weights, added in float32. A number that is not finite makes all of its row NaN.
    "int8": each group of columns of a row of `x` is rounded to 8 bits, scale = largest magnitude / 127, ties to even.
    Raises ShapeError where shapes do not fit, UsageError for types that kernels do not take.
    """
    if activations not in ("exact", "int8"):
        raise UsageError(f"activations={activations!r}: give 'exact' or 'int8'")
    added = [None] * len(matrices) if biases is None else list(biases)
    cols = x.shape[-1]
    for matrix, bias in zip(matrices, added, strict=True):
        if cols != matrix.layout.cols or (bias is not None and tuple(bias.shape) != (matrix.layout.rows,)):
            shapes = f"{tuple(x.shape)} and {None if bias is None else tuple(bias.shape)}"
            raise ShapeError(f"weights {matrix.shape} do not multiply an input and a bias of {shapes}")
    if x.dtype not in _NATIVE_INPUTS:
        raise UsageError(f"packed weights cannot multiply {x.dtype}: give float32, bfloat16 or float16")
    in_use = library_and_table()
    if in_use is None or not x.is_cpu:
        return [_plain_product(x, matrix, bias, activations) for matrix, bias in zip(matrices, added, strict=True)]
    rows = x if x.ndim == 2 else x.reshape(-1, cols) if x.numel() else x.new_empty(0, cols)
    rows = rows.contiguous()
    if rows.data_ptr() % rows.element_size():
        rows = rows.clone()
    outs = [x.new_empty(len(rows), matrix.layout.rows) for matrix in matrices]
    floats = [None if bias is None else bias.to(torch.float32).contiguous() for bias in added]
    library, table = in_use
    library.packed_multiply(
        rows.data_ptr(), len(rows), cols, [matrix.native for matrix in matrices],
        [0 if bias is None else bias.data_ptr() for bias in floats], [out.data_ptr() for out in outs],
        _NATIVE_INPUTS[x.dtype], activations == "exact", allowed_threads(), table,
    )  # fmt: skip
    return outs if x.ndim == 2 else [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def round_activations(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int8 [rows, groups, group] and float32 scales [rows, groups, 1] of `x` [rows, cols]: largest magnitude / 127."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group)).view(x.shape[0], -1, group)
    scales = padded.abs().amax(-1, keepdim=True) / 127
    is_finite = scales.isfinite()
    scales = torch.where(scales < _SMALLEST_SCALE, 0.0, scales)
    inverse = torch.where(is_finite & (scales > 0), 1 / scales, 0.0)
    codes = torch.where(is_finite, padded * inverse, 0.0).round().to(torch.int8)
    return codes, torch.where(is_finite, scales, torch.nan)


def _plain_product(x: Tensor, matrix: PackedMatrix, bias: Tensor | None, activations: Activations) -> Tensor:
    rows = x.reshape(-1, matrix.layout.cols).float()
    if activations == "int8":
        codes, scales = round_activations(rows, matrix.layout.group)
        rows = (codes.float() * scales).flatten(1)[:, : rows.shape[1]]
    rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, torch.nan)
    out = rows @ matrix.decode().to(x.device).T
    out = out if bias is None else out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], matrix.layout.rows)


def _are_codes(zeros: Tensor, element: NumberFormat) -> bool:
    """Whether zero points fit where the layout keeps them: bytes, code 0 first."""
    if zeros.is_floating_point() or not isinstance(element, Int):
        return False
    return int(zeros.min()) >= element.smallest and int(zeros.max()) <= element.smallest + 255


def _narrowest(given: Sequence[Tensor]) -> torch.dtype:
    """The narrowest type that holds all of them exactly."""
    for kind in (torch.bfloat16, torch.float16):
        if all(torch.equal(x.float(), x.to(kind).float()) for x in given):
            return kind
    return torch.float32
