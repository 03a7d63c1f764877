from __future__ import annotations

import json
import resource
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.core.errors import CheckpointError
from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.safetensors_header import DTYPES, MAX_HEADER_BYTES, Entry, read_header
from tests.models.checkpoints import entry, write_raw


def test_a_sound_file_gives_places_in_the_file(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry(2, 8, dtype="F16", shape=[1, 3]), "a": entry(0, 2)}
    file = write_raw(tmp_path / "f", header, bytes(8))
    start = file.stat().st_size - 8
    assert read_header(file) == {
        "a": Entry(torch.uint8, (2,), start, start + 2),
        "b": Entry(torch.float16, (1, 3), start + 2, start + 8),
    }


def test_the_table_of_types_is_that_of_safetensors() -> None:
    from safetensors.torch import _TYPES

    assert all(DTYPES[name] == dtype for name, dtype in _TYPES.items() if name in DTYPES)
    assert set(_TYPES) - set(DTYPES) <= {"C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


def test_spaces_after_the_header_and_empty_tensors_are_allowed(tmp_path: Path) -> None:
    raw = json.dumps({"a": entry(0, 0, shape=[0, 5]), "b": entry(0, 0), "c": entry(0, 1, shape=[])}).encode() + b"   "
    assert read_header(write_raw(tmp_path / "f", raw, b"x"))["a"].shape == (0, 5)


FAULTS: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{nonsense", b"", "not JSON"),
    "not text": (b'{"\xff": 1}', b"", "not JSON"),
    "deeply nested": (b"[" * 200_000, b"", "not JSON"),
    "a number with more digits than Python reads": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not JSON"),
    "a list": ([], b"", "is a JSON list"),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "a tensor that is no object": ({"a": 3}, b"", "'a' must have a dtype"),
    "no offsets": ({"a": {"dtype": "U8", "shape": []}}, b"", "'a' must have a dtype"),
    "unknown type": ({"a": entry(0, 1, dtype="F4")}, b"x", "'a' has the type 'F4'; known are BOOL"),
    "type that is no text": ({"a": entry(0, 1) | {"dtype": ["U8"]}}, b"x", "'a' has the type"),
    "negative length": ({"a": entry(0, 1, shape=[-1])}, b"x", "'a' has the shape"),
    "length that is no integer": ({"a": entry(0, 1) | {"shape": [1.0]}}, b"x", "'a' has the shape"),
    "length that is a truth value": ({"a": entry(0, 1) | {"shape": [True]}}, b"x", "'a' has the shape"),
    "offsets the wrong way round": ({"a": entry(1, 0, shape=[0])}, b"x", "'a' has the offsets"),
    "three offsets": ({"a": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, b"x", "'a' has the offsets"),
    "negative offset": ({"a": entry(-1, 0, shape=[1])}, b"x", "'a' has the offsets"),
    "shape and length disagree": ({"a": entry(0, 4, dtype="F32", shape=[2])}, b"xxxx", "needs 8 bytes.*gives it 4"),
    "impossible shape": ({"a": entry(0, 0, shape=[0, 2**62, 2**62])}, b"", "impossible shape"),
    "beyond the end": ({"a": entry(0, 9)}, b"12345678", "'a' ends at byte.*truncated"),
    "overlap": ({"a": entry(0, 5), "b": entry(4, 8)}, b"12345678", "'b' begins.*overlaps tensor 'a'"),
    "gap": ({"a": entry(0, 3), "b": entry(4, 8)}, b"12345678", "'b' begins.*leaves a gap after tensor 'a'"),
    "gap at the beginning": ({"a": entry(1, 8)}, b"12345678", "leaves a gap after the header"),
    "bytes that belong to no tensor": ({"a": entry(0, 3)}, b"12345678", "5 bytes after tensor 'a'"),
    "a name twice": (b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"x", "'a' twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_header_is_an_error_that_names_file_and_fault(fault: str, tmp_path: Path) -> None:
    header, data, message = FAULTS[fault]
    file = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_header(file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_of_less_than_eight_bytes_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"has {len(content)} bytes"):
        read_header(file)


def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="header has 1000 bytes, but the whole file has 10"):
        read_header(write_raw(tmp_path / "f", b"{}", length=1000))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"header has {length} bytes, at most"):
        read_header(write_raw(tmp_path / "f", b"{}", length=length))


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(file)


def test_a_file_that_cannot_be_opened_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


SOUND = {"model.a": entry(0, 24, dtype="F32", shape=[2, 3]), "model.b": entry(24, 32, dtype="BF16", shape=[4])}
HEADER_BYTES = 8 + len(json.dumps(SOUND))
# A header of 200 bytes cannot need more than this, whatever is written in it.
ALLOWED_GROWTH_KB = 256 * 1024


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_changed_in_the_header_never_give_more_than_an_error(changes: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = write_raw(Path(directory) / "model.safetensors", SOUND, bytes(32))
        content = bytearray(file.read_bytes())
        for position, value in changes:
            content[position] = value
        file.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            checkpoint = open_checkpoint(Path(directory))
            for name, info in checkpoint.tensors.items():
                assert tuple(checkpoint.read(name).shape) == info.shape
        except CheckpointError:
            pass
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < ALLOWED_GROWTH_KB


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F4"]) | JSON, "shape": st.lists(st.integers(0, 3)) | JSON,
     "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2) | JSON}
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), ENTRIES | JSON, max_size=4), st.integers(0, 32))
def test_any_json_gives_a_sound_reading_or_an_error(header: dict[str, Any], data: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = write_raw(Path(directory) / "f", header, bytes(data))
        try:
            entries = read_header(file)
        except CheckpointError:
            return
        assert sum(found.end - found.begin for found in entries.values()) == data
