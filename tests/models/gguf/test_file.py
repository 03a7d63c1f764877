"""What is read from GGUF files, sound, damaged and hostile."""

from __future__ import annotations

import random
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.core.errors import CheckpointError, ShapeError
from pennyweight.models.gguf.fields import FieldValue
from pennyweight.models.gguf.file import GgufTensor, read_gguf
from tests.models.gguf.raw import (
    ARRAY,
    F32,
    Q8_0,
    SOUND,
    STRING,
    UINT16,
    UINT32,
    array,
    field,
    gguf,
    tensor,
    text,
    u32,
)  # fmt: skip


def stored(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_sound_file_gives_values_and_places(tmp_path: Path) -> None:
    file = stored(tmp_path / "m.gguf", SOUND)
    found, data = read_gguf(file), len(SOUND) - 128
    assert (found.version, found.alignment, found.files) == (3, 32, (file,))
    assert {key: value.value for key, value in found.fields.items()} == {
        "general.architecture": "llama", "n": 7, "tokens": ["a", "", "é"], "sizes": [1, 2],
    }  # fmt: skip
    assert list(found.tensors.values()) == [
        GgufTensor("a", (2, 3), F32, file, data, 24),
        GgufTensor("b", (2, 1, 32), Q8_0, file, data + 32, 68),
    ]
    assert bytes(found.tensors["b"].read().numpy()) == bytes(range(68))
    assert found.tensors["b"].read(34, 36).tolist() == [34, 35]


def test_version_2_and_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    content = gguf([], [tensor(b"s", []), tensor(b"e", [0, 5], F32, 32)], bytes(32), version=2)
    found = read_gguf(stored(tmp_path / "f", content)).tensors
    assert [(found[name].shape, found[name].size_bytes) for name in "se"] == [((), 4), ((5, 0), 0)]


def test_an_alignment_of_its_own_moves_the_data(tmp_path: Path) -> None:
    content = gguf([field(b"general.alignment", UINT32, u32(8))], [tensor(b"a", [1], F32, 8)], bytes(12), alignment=8)
    found = read_gguf(stored(tmp_path / "f", content))
    assert (found.alignment, found.tensors["a"].position) == (8, len(content) - 4)


def test_names_that_are_not_utf8_or_longer_than_llama_cpp_allows_survive(tmp_path: Path) -> None:
    content = gguf([field(b"\xff", STRING, text(b"\xfe\0"))], [tensor(b"\xfd" * 100, [1])], bytes(4))
    found = read_gguf(stored(tmp_path / "f", content))
    assert [key.encode("utf-8", "surrogateescape") for key in (*found.fields, *found.tensors)] == [
        b"\xff", b"\xfd" * 100,
    ]  # fmt: skip
    assert found.fields["\udcff"].value.encode("utf-8", "surrogateescape") == b"\xfe\0"


VALUES: dict[GGUFValueType, st.SearchStrategy[Any]] = {
    GGUFValueType.STRING: st.text(max_size=8),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    GGUFValueType.FLOAT64: st.floats(allow_nan=False),
    **{
        GGUFValueType[f"{sign}INT{bits}"]: st.integers(
            *((0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
        )
        for sign in ("", "U")
        for bits in (8, 16, 32, 64)
    },
}
FIELDS = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.sampled_from(list(VALUES)).flatmap(
        lambda kind: st.tuples(st.just(kind), VALUES[kind] | st.lists(VALUES[kind], min_size=1, max_size=4))
    ),
    max_size=6,
)
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.tuples(st.sampled_from(list(GGML_QUANT_SIZES)), st.lists(st.integers(1, 3), min_size=1, max_size=4)),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(FIELDS, TENSORS, st.sampled_from([8, 32, 256]))
def test_what_the_gguf_package_writes_is_read(
    fields: dict[str, tuple[GGUFValueType, Any]],
    tensors: dict[str, tuple[GGMLQuantizationType, list[int]]],
    alignment: int,
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "f.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_custom_alignment(alignment)
        for key, (kind, value) in fields.items():
            if isinstance(value, list):
                writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=kind)
            else:
                writer.add_key_value(key, value, kind)
        arrays = {}
        for name, (kind, shape) in tensors.items():
            *outer, blocks = shape
            arrays[name] = np.random.default_rng(0).integers(
                0, 256, (*outer, blocks * GGML_QUANT_SIZES[kind][1]), dtype=np.uint8
            )
            writer.add_tensor(name, arrays[name], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

        found = read_gguf(path)
        assert found.alignment == alignment
        assert {key: (value.kind, value.value) for key, value in found.fields.items()} == {
            "general.architecture": (GGUFValueType.STRING, "llama"),
            "general.alignment": (GGUFValueType.UINT32, alignment),
        } | fields
        assert list(found.tensors) == list(tensors)
        for name, (kind, shape) in tensors.items():
            block = GGML_QUANT_SIZES[kind][0]
            assert found.tensors[name].shape == (*shape[:-1], shape[-1] * block)
            assert found.tensors[name].type_number == kind
            assert bytes(found.tensors[name].read().numpy()) == arrays[name].tobytes()


ONE = field(b"k", UINT32, u32(1))
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "begins with b''"),
    "another kind of file": (b"PK\3\4" + bytes(60), "begins with b'PK"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "older than GGUF": (b"tjgg" + bytes(60), "before GGUF"),
    "version 1": (gguf(version=1), "version 1 of GGUF, 2 and 3"),
    "version 4": (gguf(version=4), "version 4 of GGUF"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "no counts": (SOUND[:20], "number of tensors and fields would end at byte 24, but the file has 20"),
    "2**64 - 1 tensors": (gguf(counts=(2**64 - 1, 0)), "18446744073709551615 tensors"),
    "2**63 fields": (gguf(counts=(0, 2**63)), "9223372036854775808 fields"),
    "more fields than the file can hold": (gguf([ONE], counts=(0, 5)), "list of tensors and fields would end"),
    "a key longer than the file": (gguf([text(b"k", 2**63) + bytes(9)]), "key of field 0 would end"),
    "an empty key": (gguf([field(b"", UINT32, u32(1))]), "has no key"),
    "a key twice": (gguf([ONE, ONE]), "field 'k' occurs twice"),
    "an unknown type": (gguf([field(b"k", 13, bytes(9))]), "field 'k' has the type 13; known are 0 .UINT8."),
    "an array of unknown type": (gguf([field(b"k", ARRAY, array(99, 0, b""))]), "'k' has the type 99"),
    "an array of arrays": (gguf([field(b"k", ARRAY, array(ARRAY, 9, bytes(99)))]), "'k' is an array of arrays"),
    "a string longer than the file": (gguf([field(b"k", STRING, text(b"", 2**40))]), "'k' would end at byte 1099"),
    "an array longer than the file": (gguf([field(b"k", ARRAY, array(UINT16, 2**62, b""))]), "'k' would end"),
    "2**61 strings": (gguf([field(b"k", ARRAY, array(STRING, 2**61, b""))]), "'k' would end"),
    "strings that end early": (
        gguf([field(b"k", ARRAY, array(STRING, 2, text(b"a") + text(b"b", 99)))]), "'k' would end",
    ),
    "an alignment of 0": (gguf([field(b"general.alignment", UINT32, u32(0))]), "is 0, it must be a power of two"),
    "an alignment of 24": (gguf([field(b"general.alignment", UINT32, u32(24))]), "is 24, it must be"),
    "an alignment of another type": (gguf([field(b"general.alignment", UINT16, b"\x20\0")]), "must be one UINT32"),
    "a name longer than the file": (gguf([], [text(b"a", 2**62) + bytes(20)]), "name of tensor 0 would end"),
    "a name twice": (gguf([], [tensor(b"a", [1])] * 2, bytes(64)), "tensor 'a' occurs twice"),
    "five dimensions": (gguf([], [tensor(b"a", [1] * 5)], bytes(4)), "'a' has 5 dimensions"),
    "2**32 - 1 dimensions": (gguf([], [tensor(b"a", [1], count=2**32 - 1)], bytes(4)), "4294967295 dimensions"),
    "a dimension of 2**63": (gguf([], [tensor(b"a", [2**63])], bytes(4)), "'a' has the shape .* impossible"),
    "a product that overflows": (gguf([], [tensor(b"a", [2**33, 2**33])], bytes(4)), "'a' has the shape"),
    "nothing of something huge": (gguf([], [tensor(b"a", [0, 2**62, 2**62])]), "'a' has the shape"),
    "rows of half a block": (gguf([], [tensor(b"a", [48], Q8_0)], bytes(99)), "impossible for the type Q8_0"),
    "a scalar of a block type": (gguf([], [tensor(b"a", [], Q8_0)], bytes(99)), "impossible for the type Q8_0"),
    "an unknown tensor type": (gguf([], [tensor(b"a", [1], 4)], bytes(4)), "'a' has the type 4; known are 0 .F32."),
    "a misaligned offset": (gguf([], [tensor(b"a", [1], F32, 4)], bytes(8)), "offset 4, which is no multiple of 32"),
    "beyond the end": (gguf([], [tensor(b"a", [9])], bytes(32)), "'a' ends at byte .* truncated"),
    "an offset beyond the end": (gguf([], [tensor(b"a", [1], F32, 2**64 - 32)], bytes(32)), "'a' ends at byte"),
    "overlap": (
        gguf([], [tensor(b"a", [9]), tensor(b"b", [1], F32, 32)], bytes(64)), "'b' begins .* overlaps tensor 'a'",
    ),
    "overlap in another order": (
        gguf([], [tensor(b"a", [9], F32, 32), tensor(b"b", [9])], bytes(96)), "'a' begins .* overlaps tensor 'b'",
    ),
    "a split count that is text": (gguf([field(b"split.count", STRING, text(b"2"))]), "split.count must be a number"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_an_error_that_names_file_and_fault(fault: str, tmp_path: Path) -> None:
    content, message = FAULTS[fault]
    file = stored(tmp_path / "model.gguf", content)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_gguf(file)
    assert str(file) in str(raised.value)
    assert len(str(raised.value)) < 1500


def test_metadata_without_end_is_not_read(tmp_path: Path) -> None:
    file = stored(tmp_path / "f", gguf([field(b"k", STRING, text(b"", 2**30))]))
    with file.open("r+b") as stream:
        stream.truncate(2**31)
    with pytest.raises(CheckpointError, match="'k' would end at byte .* at most 268435456 bytes of metadata"):
        read_gguf(file)


def test_strings_that_cannot_be_there_are_not_looked_for(tmp_path: Path) -> None:
    file = stored(tmp_path / "f", gguf([field(b"k", ARRAY, array(STRING, 2**61, b""))]))
    with file.open("r+b") as stream:
        stream.truncate(100_000_000)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="'k' would end at byte 18446744"):
        read_gguf(file)
    assert time.process_time() - start < 0.5


def test_a_file_that_cannot_be_opened_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(tmp_path / "missing.gguf")


def test_a_tensor_is_read_within_its_bounds_and_while_its_file_is_whole(tmp_path: Path) -> None:
    file = stored(tmp_path / "f", SOUND)
    found = read_gguf(file).tensors["a"]
    for begin, end in ((-1, 3), (3, 2), (0, 25)):
        with pytest.raises(ShapeError, match="the tensor has 24"):
            found.read(begin, end)
    file.write_bytes(SOUND[:-110])
    with pytest.raises(CheckpointError, match="has become shorter"):
        found.read()


# What is kept of a file: its metadata twice while it is read, and Python's objects for at most one field or tensor
# in every 13 bytes of it.
ALLOWED_BYTES = 60_000


def read_or_refuse(file: Path) -> bool:
    """Whether `file` could be read, all fields and tensors included; anything but a CheckpointError passes through."""
    tracemalloc.start()
    try:
        found = read_gguf(file)
        sizes = [value.raw and len(repr(value.value)) for value in found.fields.values()]
        read = [len(place.read()) for place in found.tensors.values()]
        assert sum(read) + len(sizes) <= file.stat().st_size
    except CheckpointError:
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < ALLOWED_BYTES
    return True


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    for length in range(len(SOUND)):
        whole = length >= len(SOUND) - 28
        assert read_or_refuse(stored(tmp_path / "f", SOUND[:length])) == whole


@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0xFF])
def test_any_byte_changed_gives_a_reading_or_an_error(value: int, tmp_path: Path) -> None:
    for position in range(len(SOUND) - 128):
        changed = bytearray(SOUND)
        changed[position] = value
        read_or_refuse(stored(tmp_path / "f", bytes(changed)))


def test_many_bytes_changed_give_a_reading_or_an_error(tmp_path: Path) -> None:
    chance = random.Random(0)
    outcomes = set()
    for _ in range(800):
        changed = bytearray(SOUND)
        for _ in range(chance.randint(1, 6)):
            begin = chance.randrange(len(SOUND) - 128)
            size = chance.choice([1, 1, 2, 4, 8])
            changed[begin : begin + size] = chance.choice(
                [chance.randbytes(size), b"\xff" * size, struct.pack("<Q", chance.randrange(100))[:size]]
            )
        outcomes.add(read_or_refuse(stored(tmp_path / "f", bytes(changed))))
    assert outcomes == {True, False}


def test_a_large_vocabulary_is_read_at_once(tmp_path: Path) -> None:
    texts = b"".join(text(b"token%d" % number) for number in range(260_000))
    file = stored(tmp_path / "f", gguf([field(b"tokens", ARRAY, array(STRING, 260_000, texts))]))
    tracemalloc.start()
    read_gguf(file)
    assert tracemalloc.get_traced_memory()[1] < 4 * len(texts)
    tracemalloc.stop()
    start = time.process_time()
    value = read_gguf(file).fields["tokens"]
    # Takes 0.05 s; one object a string, or a copy of the whole for each, is far slower than the bound.
    assert time.process_time() - start < 1
    assert value.value[-1] == "token259999"


def part(number: int, count: int, tensors: list[bytes], data: bytes = b"", *, total: int = 3) -> bytes:
    said = [field(b"k", UINT32, u32(5))] if number == 0 else []
    said += [
        field(b"split.no", UINT16, struct.pack("<H", number)),
        field(b"split.tensors.count", 5, struct.pack("<i", total)),
        field(b"split.count", UINT16, struct.pack("<H", count)),
    ]
    return gguf(said, tensors, data)


PARTS = {
    "m-00001-of-00003.gguf": part(0, 3, []),
    "m-00002-of-00003.gguf": part(1, 3, [tensor(b"a", [1]), tensor(b"b", [1], F32, 32)], b"AAAA" + bytes(28) + b"BBBB"),
    "m-00003-of-00003.gguf": part(2, 3, [tensor(b"c", [1])], b"CCCC"),
}
FIRST = "m-00001-of-00003.gguf"


def split_files(directory: Path, **changed: bytes | None) -> Path:
    for (name, content), new in zip(PARTS.items(), [changed.get(key, b"") for key in ("p1", "p2", "p3")], strict=True):
        if new is not None:
            (directory / name).write_bytes(new or content)
    return directory / FIRST


def test_parts_are_found_and_joined(tmp_path: Path) -> None:
    found = read_gguf(split_files(tmp_path))
    assert [file.name for file in found.files] == list(PARTS)
    assert dict(found.fields) == {"k": FieldValue(GGUFValueType.UINT32, u32(5))}
    assert {name: bytes(place.read().numpy()) for name, place in found.tensors.items()} == {
        "a": b"AAAA", "b": b"BBBB", "c": b"CCCC",
    }  # fmt: skip


def test_a_file_that_was_merged_is_whole(tmp_path: Path) -> None:
    found = read_gguf(stored(tmp_path / "m.gguf", part(0, 0, [tensor(b"a", [1])], b"AAAA", total=9)))
    assert (list(found.fields), list(found.tensors)) == (["k"], ["a"])


SPLIT_FAULTS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "one is missing": ({"p2": None}, "1 of its 3 parts are missing, the first of them m-00002-of-00003.gguf"),
    "one of another split": ({"p2": part(1, 2, [])}, "split.no 1 and split.count 2, its name says 1 and 3"),
    "in the wrong order": ({"p2": part(2, 3, [])}, "split.no 2 and split.count 3"),
    "one that is whole": ({"p3": gguf()}, "split.no None and split.count None"),
    "a tensor in two": ({"p3": part(2, 3, [tensor(b"a", [1])], b"CCCC")}, "'a' is already in m-00002-of-00003"),
    "a tensor too few": ({"p3": part(2, 3, [])}, "hold 3 tensors together, they hold 2"),
    "a damaged one": ({"p3": part(2, 3, [tensor(b"c", [1])], b"CCC")}, "m-00003-of-00003.gguf: tensor 'c' ends at"),
}


@pytest.mark.parametrize("fault", SPLIT_FAULTS)
def test_parts_that_do_not_belong_together_are_refused(fault: str, tmp_path: Path) -> None:
    changed, message = SPLIT_FAULTS[fault]
    with pytest.raises(CheckpointError, match=message):
        read_gguf(split_files(tmp_path, **changed))


def test_a_part_other_than_the_first_names_the_first(tmp_path: Path) -> None:
    split_files(tmp_path)
    with pytest.raises(CheckpointError, match=f"is part 2 of 3. Give the first, {tmp_path / FIRST}"):
        read_gguf(tmp_path / "m-00002-of-00003.gguf")


def test_a_first_part_of_another_name_is_told_its_own(tmp_path: Path) -> None:
    path = split_files(tmp_path).rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="Rename it to NAME-00001-of-00003.gguf"):
        read_gguf(path)
