"""Call everything that the native library offers; `make sanitize` runs this on an instrumented build.

python tests/native_exercise.py DIR    DIR: where the package is installed; imports nothing but the library
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import random
import struct
import sys
from array import array
from pathlib import Path
from typing import Any


def main(directory: Path) -> None:
    random.seed(0)
    [library] = (directory / "pennyweight").glob("_native*.so")
    spec = importlib.util.spec_from_file_location("_native", library)
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    print(f"{library.name} {native.version()}:", *native.instruction_sets())
    for table in native.kernel_tables():
        for columns, rows in ((1, 1), (5, 63), (7, 64), (33, 130)):
            for stored in range(3):
                _round_block(native, table, columns, rows, stored)
                _search_groups(native, table, columns, rows, stored)
                for span in (1, 2, 16):
                    _search_nested(native, table, columns * span, rows, span, stored)
        if table in ("amx", "avx512bf16"):
            for rows in (1, 2, 301):
                _add_products(native, table, rows)
        for bits, group in itertools.product((2, 3, 4, 5, 6, 8), (16, 32, 48, 64, 128)):
            if group % 32 == 0 or bits not in (3, 5):
                _multiply_packed(native, table, bits, group)
        for stored, is_exact in itertools.product((0, 1), (False, True)):
            _decode_text(native, table, stored, is_exact)
        native.read_memory(memoryview(bytearray(100_003)), 3, table)
        print(f"{table}: every kernel ran")
    _read_damaged(native)


def _matrix(*shape: int, step: float = 0.37) -> memoryview:
    """Numbers between -1 and 1 that look random enough."""
    count = shape[0] * (shape[1] if len(shape) == 2 else 1)
    numbers = array("f", ((index * step) % 2.0 - 1.0 for index in range(count)))
    return memoryview(numbers).cast("B").cast("f", shape=list(shape))


def _round_block(native: Any, table: str, columns: int, rows: int, stored: int) -> None:
    targets, weights, values, errors = (_matrix(columns, rows) for _ in range(4))
    scales, zeros = _matrix(2, rows, step=0.0), _matrix(2, rows)
    groups = memoryview(array("q", (index % 2 for index in range(columns))))
    lower = _matrix(columns, columns)
    for fields in ((None, None), (zeros, None), (None, zeros)):
        for element in (None, _matrix(2, 16, step=0.05)):
            given = (
                targets,
                weights,
                values,
                errors,
                lower,
                scales,
                *fields,
                groups,
                -8.0,
                7.0,
                element,
                stored,
                table,
            )
            native.round_block(*given)


def _search_groups(native: Any, table: str, groups: int, size: int, stored: int) -> None:
    w = _matrix(groups, size)
    for importance in (None, _matrix(1, size, step=0.01)):
        for zeros in (None, _matrix(groups, step=0.0)):
            scales, factors = _matrix(groups, step=0.0), _matrix(3, 1 if zeros is None else 2, step=0.1)
            more = (None, None, None)
            native.search_groups(w, importance, scales, zeros, factors, -8.0, 7.0, 1e30, 1e-30, stored, *more, table)
            codes = memoryview(bytearray(groups * size)).cast("B", shape=[groups, size])
            native.encode_groups(w, scales, zeros, codes, -8.0, 7.0, table)
        scales, factors = _matrix(groups, step=0.0), _matrix(3, 1, step=0.1)
        more = (_matrix(2, 16, step=0.05), _matrix(2, 5, step=0.2), _matrix(groups, step=0.0))
        native.search_groups(w, importance, scales, None, factors, -1.0, 1.0, 1e30, 1e-30, stored, *more, table)
    halves = memoryview(bytearray(2 * groups * size)).cast("B").cast("H", shape=[groups, size])
    scales = _matrix(groups, step=0.0)
    for weights in (w, halves):
        native.range_groups(weights, _matrix(groups), _matrix(groups), table)
        native.encode_groups(weights, scales, None, codes, -8.0, 7.0, table)
    native.pack_nibbles(memoryview(bytearray(2 * size)), memoryview(bytearray(size)), table)


def _search_nested(native: Any, table: str, groups: int, size: int, span: int, stored: int) -> None:
    w = _matrix(groups, size)
    floats = (_matrix(groups), None, stored, -1.0, 1.0, 1e30, 0.0, 1e-30, 0.0)
    codes = (_matrix(groups), _matrix(groups // span), stored, 0.0, 63.0, 1e30, 1e30, 1.0, 1e-30)
    for importance in (None, _matrix(1, size, step=0.01)):
        for element in (None, _matrix(2, 16, step=0.05)):
            for scale, offset in ((floats, floats), (codes, None), (codes, codes), (codes, floats), (floats, codes)):
                factors = _matrix(3, 1 if offset is None else 2, step=0.1)
                more = (_matrix(5, step=0.1), 4, 2.0, True, span, 0.0, 15.0, element, table)
                native.search_nested(w, importance, scale, offset, factors, *more)


def _add_products(native: Any, table: str, rows: int) -> None:
    columns = 192
    x = memoryview(bytearray(2 * rows * columns)).cast("B").cast("H", shape=[rows, columns])
    pairs = (rows + 1) // 2
    panels = memoryview(bytearray(4 * pairs * columns)).cast("B").cast("I", shape=[columns // 64, pairs, 64])
    for panel in range(columns // 64):
        native.pair_rows(x, panel, panels, table)
    native.add_products(panels, _matrix(columns, columns), 0, 3, 1, 3, table)


def _header(rows: int, cols: int, kinds: tuple[int, int, int, int], group: int) -> bytes:
    return struct.pack("<8sIIBBBBHHff32x", b"PWPACKED", rows, cols, *kinds, group, 16, 0.0, 0.5)


def _packed(rows: int, cols: int, kinds: tuple[int, int, int, int], group: int) -> bytes:
    """Storage in the layout of pennyweight.kernels.layout, with any bytes for codes; `kinds`: bits, kind of scale, kind
    of zero, bits of the table."""
    bits, scale, zero, table_bits = kinds
    groups = -(-cols // group)
    wide = [4, 2, 2][scale]
    sizes = [groups * group * 2 * bits, groups * 16 * wide, groups * 16 * [0, 1, wide, wide][zero]]
    table = array("f", (index / 7 - 1 for index in range(2**table_bits if table_bits else 0))).tobytes()
    tile = b"".join(random.randbytes(size) + bytes(-size % 64) for size in sizes)
    return _header(rows, cols, kinds, group) + table + tile * -(-rows // 16)


def _multiply_packed(native: Any, table: str, bits: int, group: int) -> None:
    for rows, groups, tokens in ((1, 1, 1), (17, 3, 2), (33, 2, 13), (70, 2, 101)):
        cols = groups * group - random.randrange(16)
        kinds = [(0, 0, 0), (1, 1, 0), (2, 2, 0), (0, 3, 0), (1, 2, 8), *([(2, 0, 4)] if bits <= 4 else [])]
        storages = [array("B", _packed(rows, cols, (bits, *kind), group)) for kind in kinds]
        matrices = [native.Packed(memoryview(storage)) for storage in storages]
        for kind, is_exact in itertools.product(range(3), (False, True)):
            size = 2 if kind else 4
            x, bias = array("B", random.randbytes(tokens * cols * size)), array("f", [0.5] * rows)
            outs = [array("B", bytes(tokens * rows * size)) for _ in matrices]
            places = [out.buffer_info()[0] for out in outs]
            biases = [index % 2 * bias.buffer_info()[0] for index in range(len(outs))]
            threads = 1 + tokens % 3
            given = (x.buffer_info()[0], tokens, cols, matrices, biases, places, kind, is_exact, threads, table)
            native.packed_multiply(*given)


def _decode_text(native: Any, table: str, stored: int, is_exact: bool) -> None:
    """A text of 40 tokens, some together and some alone, with room made in between."""
    hidden, width, heads, inner, words = 32, 16, 4, 48, 40
    kept = []

    def address(*shape: int) -> int:
        kept.append(_matrix(*shape))
        return ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))

    def linear(rows: int, cols: int) -> Any:
        return native.dense_linear(address(rows, cols), 0, rows, cols, 0)

    shapes = ((64, 32), (32, 32), (32, 32), (32, 64), (inner, 32), (inner, 32), (32, inner))
    for window in (0, 5):
        blocks = [
            native.decoder_block(address(hidden), 0, 0, address(hidden), [linear(*shape) for shape in shapes], window)
            for _ in range(2)
        ]
        decoder = native.Decoder(
            hidden, heads, 2, width, width, 1e-5, 0.25, 0, is_exact, stored, blocks, address(hidden),
            linear(words, hidden), table,
        )  # fmt: skip
        for room, tokens in ((3, 3), (20, 9), (40, 1), (40, 27)):
            decoder.reserve(room, address(room, width), address(room, width))
            decoder.run(address(tokens, hidden), tokens, address(words), 2)
        for block in range(2):
            decoder.copy(block, address(2 * decoder.length, width), address(2 * decoder.length, width))


def _read_damaged(native: Any) -> None:
    """Headers of any bytes: read or refused."""
    read = 0
    for _ in range(3000):
        storage = bytearray(_packed(20, 100, (4, random.randrange(3), random.randrange(4), 0), 32))
        for _ in range(random.randrange(1, 4)):
            storage[random.randrange(8, 32)] = random.choice((0, 1, 4, 8, 255, random.randrange(256)))
        try:
            matrix = native.Packed(memoryview(storage[: random.choice((len(storage), random.randrange(200)))]))
        except ValueError:
            continue
        cols = struct.unpack_from("<I", storage, 12)[0]
        rows = struct.unpack_from("<I", storage, 8)[0]
        x, out = (ctypes.c_float * cols)(), (ctypes.c_float * rows)()
        place = (ctypes.addressof(x), 1, cols, [matrix], [0], [ctypes.addressof(out)])
        native.packed_multiply(*place, 0, True, 1, native.kernel_tables()[0])
        read += 1
    print(f"damaged headers: {read} of 3000 were read")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
