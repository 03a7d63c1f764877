"""Call everything that the native library offers; `make sanitize` runs this on an instrumented build.

python tests/native_exercise.py DIR    DIR: where the package is installed; imports nothing but the library
"""

from __future__ import annotations

import importlib.util
import sys
from array import array
from pathlib import Path
from typing import Any


def main(directory: Path) -> None:
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
        if table == "avx512bf16":
            for rows in (1, 2, 301):
                _add_products(native, table, rows)
        print(f"{table}: every kernel ran")


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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
