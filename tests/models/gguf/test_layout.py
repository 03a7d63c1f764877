"""GGUF files as they are laid out: to the byte, and as llama.cpp's own reader sees them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.core.errors import ContainerError, PennyweightError, ShapeError
from pennyweight.models.gguf.fields import FieldValue, decoded_text
from pennyweight.models.gguf.file import read_gguf
from pennyweight.models.gguf.layout import GgufPart, TensorEntry, header_bytes, split_layout
from tests.models.gguf import raw

UINT32 = GGUFValueType.UINT32


def of(value: Any, kind: GGUFValueType = UINT32) -> FieldValue:
    return FieldValue.of(value, kind)


def test_the_bytes_are_those_of_the_format() -> None:
    fields = {
        "general.architecture": of("llama", GGUFValueType.STRING),
        "n": of(7),
        "tokens": FieldValue.array(["a", "", "é"], GGUFValueType.STRING),
        "sizes": FieldValue.array([1, 2], GGUFValueType.UINT16),
    }
    header, positions = header_bytes(fields, [("a", (2, 3), 0, 24), ("b", (2, 1, 32), 8, 68)])
    assert header == raw.SOUND[:-128]
    assert positions == {"a": len(header), "b": len(header) + 32}


KINDS = sorted(set(GGUFValueType) - {GGUFValueType.ARRAY})
WIDTHS = dict(zip(KINDS, [1, 1, 2, 2, 4, 4, 4, 1, 0, 8, 8, 8], strict=True))


@st.composite
def stored_fields(draw: st.DrawFn, kinds: Sequence[GGUFValueType] = tuple(KINDS)) -> FieldValue:
    """Any value, whatever its bytes: NaN with payloads, strings that are no text, empty arrays."""
    kind = draw(st.sampled_from(kinds))
    count = draw(st.none() | st.integers(0, 3))
    number = 1 if count is None else count
    if kind is GGUFValueType.STRING:
        return FieldValue(kind, b"".join(raw.text(draw(st.binary(max_size=6))) for _ in range(number)), count)
    size = number * WIDTHS[kind]
    return FieldValue(kind, draw(st.binary(min_size=size, max_size=size)), count)


# A bool above 1 and a signalling NaN keep their bytes in the file, but not as values of Python.
EXACT = sorted(set(KINDS) - {GGUFValueType.BOOL, GGUFValueType.FLOAT32})


@settings(max_examples=200, deadline=None)
@given(stored_fields(EXACT))
def test_a_value_that_is_decoded_and_stored_again_has_the_same_bytes(value: FieldValue) -> None:
    again = of(value.value, value.kind) if value.count is None else FieldValue.array(value.value, value.kind)
    assert again == value


ENTRIES = st.lists(
    st.tuples(
        st.binary(min_size=1, max_size=63), st.sampled_from(sorted(GGML_QUANT_SIZES)),
        st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2),
    ),
    max_size=5, unique_by=lambda entry: entry[0],
)  # fmt: skip


def entry(name: str, kind: int, shape: Sequence[int]) -> TensorEntry:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return name, shape, kind, math.prod(shape) // block * size


def written(directory: Path, part: GgufPart, data: Mapping[str, bytes]) -> Path:
    content = bytearray(part.size_bytes)
    content[: len(part.header)] = part.header
    for name, position in part.positions.items():
        content[position : position + len(data[name])] = data[name]
    (directory / part.file).write_bytes(content)
    return directory / part.file


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.binary(min_size=1, max_size=6), stored_fields(), max_size=5),
    ENTRIES,
    st.sampled_from([1, 16, 32, 128]),
)
def test_what_is_laid_out_is_read_back(fields: Any, entries: Any, alignment: int) -> None:
    named = {decoded_text(key): value for key, value in fields.items()}
    tensors = [
        entry(decoded_text(name), kind, (*outer, blocks * GGML_QUANT_SIZES[kind][0]))
        for name, kind, outer, blocks in entries
    ]
    data = {name: bytes([index + 1]) * size for index, (name, _, _, size) in enumerate(tensors)}
    (part,) = split_layout("f", named, tensors, max_file_bytes=1 << 40, alignment=alignment)
    with tempfile.TemporaryDirectory() as directory:
        found = read_gguf(written(Path(directory), part, data))
        assert part.size_bytes % alignment == 0
        added = {} if alignment == 32 else {"general.alignment": of(alignment)}
        assert list(found.fields.items()) == list((named | added).items())
        assert [(t.name, t.shape, t.type_number, t.size_bytes) for t in found.tensors.values()] == tensors
        assert {name: place.position for name, place in found.tensors.items()} == part.positions
        assert {name: bytes(place.read().numpy()) for name, place in found.tensors.items()} == data


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=6), st.integers(0, 99) | st.lists(st.text(), min_size=1), max_size=4),
    ENTRIES.map(lambda entries: [(f"t{index}", *entry[1:]) for index, entry in enumerate(entries)]),
    st.sampled_from([8, 32, 64]),
)
def test_the_gguf_package_reads_what_is_laid_out(fields: dict[str, Any], entries: Any, alignment: int) -> None:
    values = {
        key: FieldValue.array(value, GGUFValueType.STRING) if isinstance(value, list) else of(value)
        for key, value in fields.items()
    }
    tensors = [
        entry(name, kind, ([1 + length for length in outer] + [(1 + blocks) * GGML_QUANT_SIZES[kind][0]]))
        for name, kind, outer, blocks in entries
    ]
    data = {name: bytes([index + 1]) * size for index, (name, _, _, size) in enumerate(tensors)}
    header, positions = header_bytes(values, tensors, alignment=alignment)
    size = max([len(header), *(positions[name] + len(data[name]) for name in data)])
    with tempfile.TemporaryDirectory() as directory:
        path = written(Path(directory), GgufPart("f", header, positions, size), data)
        reader = GGUFReader(path)
        assert {key: reader.fields[key].contents() for key in fields} == fields
        assert reader.alignment == alignment
        for (name, shape, kind, _), found in zip(tensors, reader.tensors, strict=True):
            assert (found.name, [int(length) for length in found.shape]) == (name, [*reversed(shape)])
            assert (found.tensor_type, found.data_offset) == (kind, positions[name])
            assert found.data.tobytes() == data[name]
        del reader


def test_several_files_are_those_of_llama_gguf_split(tmp_path: Path) -> None:
    tensors = [entry(name, 0, (length,)) for name, length in (("a", 8), ("b", 8), ("c", 9), ("d", 100), ("e", 1))]
    data = {name: name.encode() * size for name, _, _, size in tensors}
    parts = split_layout("m", {"k": of(5)}, tensors, max_file_bytes=64)
    assert [(part.file, [*part.positions]) for part in parts] == [
        ("m-00001-of-00004.gguf", ["a", "b"]), ("m-00002-of-00004.gguf", ["c"]),
        ("m-00003-of-00004.gguf", ["d"]), ("m-00004-of-00004.gguf", ["e"]),
    ]  # fmt: skip
    # Which of these fields are there, of what type and in what order, is what llama-gguf-split writes.
    said = [
        raw.field(b"split.no", raw.UINT16, b"\1\0"),
        raw.field(b"split.tensors.count", raw.INT32, raw.u32(5)),
        raw.field(b"split.count", raw.UINT16, b"\4\0"),
    ]
    assert parts[1].header == raw.gguf(said, [raw.tensor(b"c", [9])])
    assert parts[0].header.count(b"split.") == 3
    paths = [written(tmp_path, part, data) for part in parts]
    assert [path.stat().st_size - len(part.header) for path, part in zip(paths, parts, strict=True)] == [
        64,
        64,
        416,
        32,
    ]
    found = read_gguf(paths[0])
    assert dict(found.fields) == {"k": of(5)}
    assert {name: bytes(place.read().numpy()) for name, place in found.tensors.items()} == data


def test_parts_are_all_aligned_as_asked() -> None:
    parts = split_layout("m", {}, [entry("a", 0, (1,)), entry("b", 0, (1,))], max_file_bytes=1, alignment=256)
    assert [(part.size_bytes, b"general.alignment" in part.header) for part in parts] == [(512, True)] * 2


REFUSED: dict[str, tuple[dict[str, FieldValue], list[TensorEntry], str]] = {
    "a name of 64 bytes": ({}, [entry("é" * 32, 0, (1,))], "has 64 bytes, llama.cpp reads names of at most 63"),
    "a name twice": ({}, [entry("a", 0, (1,))] * 2, "a: given twice"),
    "five dimensions": ({}, [entry("a", 0, (1,) * 5)], "a: has 5 dimensions"),
    "a type that is none": ({}, [("a", (1,), 4, 4)], "ggml has no type 4"),
    "bytes that are not those of the shape": ({}, [("a", (2, 3), 0, 12)], r"\[2, 3\] of type F32 has 24 bytes, not 12"),
    "rows that no blocks fill": ({}, [("a", (33,), 8, 34)], "cannot be cut into its blocks"),
    "a field without a key": ({"": of(1)}, [], "needs a key"),
    "another alignment in the fields": ({"general.alignment": of(64)}, [], "does not say UINT32 32"),
    "fields of a split": ({"split.no": of(1)}, [], "split.no cannot be given"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_llama_cpp_would_not_read_is_refused(fault: str) -> None:
    fields, tensors, message = REFUSED[fault]
    with pytest.raises(PennyweightError, match=message) as raised:
        split_layout("m", fields, tensors, max_file_bytes=1 << 30)
    assert isinstance(raised.value, ContainerError | ShapeError)


def test_no_more_files_than_their_numbers_allow() -> None:
    tensors = [entry(f"{index}", 0, (1,)) for index in range(65536)]
    with pytest.raises(ContainerError, match="65536 files, GGUF counts up to 65535"):
        split_layout("m", {}, tensors, max_file_bytes=1)


@pytest.mark.parametrize("alignment", [0, -32, 24])
def test_an_alignment_is_a_power_of_two(alignment: int) -> None:
    with pytest.raises(ContainerError, match="power of two"):
        header_bytes({}, [], alignment=alignment)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (256, GGUFValueType.UINT8), (-1, GGUFValueType.UINT64), (1.5, GGUFValueType.INT32), ("1", GGUFValueType.INT32),
        (1e39, GGUFValueType.FLOAT32), (1, GGUFValueType.BOOL), (1, GGUFValueType.STRING), ([1], GGUFValueType.ARRAY),
        ("\ud800", GGUFValueType.STRING), (None, GGUFValueType.FLOAT64),
    ],
)  # fmt: skip
def test_a_value_that_its_type_cannot_hold_is_refused(value: Any, kind: GGUFValueType) -> None:
    with pytest.raises(ContainerError, match="cannot be stored"):
        of(value, kind)
    with pytest.raises(ContainerError, match="cannot be stored"):
        FieldValue.array([value], kind)
