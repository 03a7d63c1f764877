"""Importance matrices, written and read in both of llama.cpp's formats."""

from __future__ import annotations

import random
import struct
import tempfile
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.core.errors import CheckpointError, ContainerError, ShapeError
from pennyweight.models.gguf.imatrix import Importance, read_imatrix, write_imatrix
from tests.models.gguf import raw

GATE, DOWN = "blk.0.ffn_gate.weight", "blk.0.ffn_down_exps.weight"
# What is stored is a product and what is read a quotient, both rounded to float32.
TWO_ROUNDINGS = 2**-23


def importance(values: Sequence[Sequence[float]], counts: Sequence[int]) -> Importance:
    return Importance(torch.tensor(values), torch.tensor(counts))


# 0.5 and its like times these counts are exact, so that bytes can be compared.
ENTRIES = {
    GATE: importance([[0.5, 2.0, 0.0]], [96]),
    DOWN: importance([[1.5, 0.25], [1.0, 1.0], [3.0, 8.0]], [10, 0, 64]),
}


def write(path: Path, entries: Mapping[str, Importance] = ENTRIES, *, legacy: bool = False) -> Path:
    write_imatrix(path, entries, dataset="texte é.txt", chunk_size=32, chunk_count=3, legacy=legacy)
    return path


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def legacy(*entries: tuple[bytes, int, bytes], count: int | None = None, end: bytes = b"") -> bytes:
    """A legacy file with entries (name, calls, values), that says it has `count` of them."""
    listed = [
        struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values) // 4) + values
        for name, calls, values in entries
    ]
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(listed) + end


def sums(name: bytes, in_sum2: Sequence[int], counts: Sequence[int], offset: int = 32) -> list[bytes]:
    return [raw.tensor(name + b".in_sum2", in_sum2), raw.tensor(name + b".counts", counts, raw.F32, offset)]


FIELDS = [
    raw.field(b"general.type", raw.STRING, raw.text(b"imatrix")),
    raw.field(b"imatrix.datasets", raw.ARRAY, raw.array(raw.STRING, 1, raw.text("texte é.txt".encode()))),
    raw.field(b"imatrix.chunk_count", raw.UINT32, raw.u32(3)),
    raw.field(b"imatrix.chunk_size", raw.UINT32, raw.u32(32)),
]


def test_the_bytes_are_those_that_llama_imatrix_writes(tmp_path: Path) -> None:
    tensors = [
        raw.tensor(b"blk.0.ffn_down_exps.weight.in_sum2", [2, 3]),
        raw.tensor(b"blk.0.ffn_down_exps.weight.counts", [1, 3], raw.F32, 32),
        raw.tensor(b"blk.0.ffn_gate.weight.in_sum2", [3], raw.F32, 64),
        raw.tensor(b"blk.0.ffn_gate.weight.counts", [1], raw.F32, 96),
    ]
    data = [floats(15, 2.5, 0, 0, 192, 512), floats(10, 0, 64), floats(48, 192, 0), floats(96)]
    expected = raw.gguf(FIELDS, tensors, b"".join(piece.ljust(32, b"\0") for piece in data))
    assert write(tmp_path / "f").read_bytes() == expected


def test_the_legacy_bytes_are_those_that_llama_imatrix_writes(tmp_path: Path) -> None:
    # Calls are chunks of 32 rounded up: 64 tokens in the largest expert are 2, 96 are 3.
    expected = legacy(
        (DOWN.encode(), 2, floats(3, 0.5, 2, 2, 6, 16)),
        (GATE.encode(), 3, floats(1.5, 6, 0)),
        end=struct.pack("<ii", 3, 12) + "texte é.txt".encode(),
    )
    assert write(tmp_path / "f", legacy=True).read_bytes() == expected


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    reader = GGUFReader(write(tmp_path / "f"))
    assert reader.fields["imatrix.datasets"].contents() == ["texte é.txt"]
    assert {name: reader.fields[f"imatrix.chunk_{name}"].contents() for name in ("size", "count")} == {
        "size": 32, "count": 3,
    }  # fmt: skip
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name, entry in ENTRIES.items():
        counts = found[name + ".counts"].reshape(-1, 1)
        assert np.array_equal(found[name + ".in_sum2"].reshape(len(counts), -1), entry.values.numpy() * counts)
    del reader


@st.composite
def all_entries(draw: st.DrawFn) -> dict[str, Importance]:
    found = {}
    for name in draw(st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=4)):
        rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        # Subnormal products would be rounded more coarsely.
        mean = st.floats(0, 2.0**60, width=32).filter(lambda value: value == 0 or value > 2.0**-100)
        values = draw(st.lists(mean, min_size=rows * width, max_size=rows * width))
        counts = torch.tensor(draw(st.lists(st.integers(0, 10**6), min_size=rows, max_size=rows)))
        kept = torch.where(counts[:, None] > 0, torch.tensor(values, dtype=torch.float32).reshape(rows, width), 1.0)
        found[name] = Importance(kept, counts)
    return found


@settings(max_examples=200, deadline=None)
@given(all_entries(), st.booleans())
def test_what_is_written_is_read(entries: dict[str, Importance], old: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        found = read_imatrix(write(Path(directory) / "f", entries, legacy=old))
    assert list(found) == sorted(entries, key=str.encode)
    for name, entry in entries.items():
        values = found[name].for_weight(name, (len(entry.counts), 7, entry.values.shape[1]))
        assert torch.allclose(values, entry.values, rtol=TWO_ROUNDINGS, atol=0)
        if not old:
            assert torch.equal(found[name].counts, entry.counts)


def test_sums_become_means_as_in_llama_quantize(tmp_path: Path) -> None:
    """Counts are rounded to whole numbers; rows without inputs are 1 whatever their sums; a dense weight of several
    matrices has one row of all of them."""
    tensors = [
        *sums(b"a", [2, 3], [1, 3]),
        raw.tensor(b"b.counts", [1], raw.F32, 64),
        raw.tensor(b"b.in_sum2", [2, 2], raw.F32, 96),
    ]
    data = [floats(1, 2, 7, float("nan"), 6, 0), floats(3, 0.25, 1.5), floats(4), floats(1, 2, 3, 4)]
    path = tmp_path / "f"
    path.write_bytes(raw.gguf([], tensors, b"".join(piece.ljust(32, b"\0") for piece in data)))
    found = read_imatrix(path)
    third = np.float32(1) / np.float32(3), np.float32(2) / np.float32(3)
    assert torch.equal(found["a"].values, torch.tensor([third, (1, 1), (3, 0)], dtype=torch.float32))
    assert found["a"].counts.tolist() == [3, 0, 2]
    assert found["b"].for_weight("b", (2, 9, 2)).tolist() == [[0.25, 0.5], [0.75, 1.0]]


@pytest.mark.parametrize("end", [b"", struct.pack("<i", 5), struct.pack("<ii", 5, 1) + b"d"])
def test_a_legacy_file_may_end_after_its_entries(end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(legacy((b"a", 4, floats(2, 8)), (b"b", 0, floats(3)), end=end))
    found = read_imatrix(path)
    assert {name: entry.values.tolist() for name, entry in found.items()} == {"a": [[0.5, 2.0]], "b": [[3.0]]}


def test_a_weight_of_another_shape_is_refused() -> None:
    for shape in ((4, 2), (2, 4, 3), (6,), ()):
        with pytest.raises(ShapeError, match=f"{GATE}: the importance matrix has 3 values"):
            ENTRIES[GATE].for_weight(GATE, shape)
    assert ENTRIES[DOWN].for_weight(DOWN, (3, 5, 2)).shape == (3, 2)


NAN, INFINITE = float("nan"), float("inf")
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the number of entries would have 4 bytes where 0 are left"),
    "no entries": (legacy(), "neither GGUF nor a legacy importance matrix"),
    "another kind of file": (b"PK\3\4" + bytes(99), "neither GGUF nor a legacy"),
    "less than it says": (legacy((b"a", 1, floats(1)), count=2), "entry 1 would have 4 bytes where 0"),
    "a name without end": (struct.pack("<ii", 1, 2**30), "name of entry 0 would have 1073741824 bytes where 0"),
    "a name of negative length": (struct.pack("<ii", 1, -1) + bytes(9), "name of entry 0 would have -1 bytes"),
    "no name": (legacy((b"", 1, floats(1))), "has no name"),
    "a name twice": (legacy((b"a", 1, floats(1)), (b"a", 1, floats(1))), "entry 'a' has no name, one that occurs"),
    "no values": (legacy((b"a", 1, b"")), "or no values"),
    "values without end": (
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1), "'a' would have 8589934588 bytes",
    ),
    "a value cut off": (legacy((b"a", 1, floats(1, 2)))[:-1], "entry 'a' would have 8 bytes where 7"),
    "a dataset cut off": (legacy((b"a", 1, floats(1)), end=struct.pack("<ii", 1, 9)), "name of the dataset"),
    "bytes behind": (legacy((b"a", 1, floats(1)), end=struct.pack("<ii", 1, 0) + b"x"), "1 bytes after the last"),
    "not finite": (legacy((b"a", 1, floats(1, NAN))), "'a' has values that are negative or not finite"),
    "negative": (legacy((b"a", 1, floats(-1))), "'a' has values that are negative"),
    "a model": (raw.SOUND, "is a GGUF file without importances"),
    "a damaged GGUF file": (raw.gguf([], sums(b"a", [1], [1])), "'a.counts' ends at|'a.in_sum2' ends at"),
    "sums without counts": (raw.gguf([], [raw.tensor(b"a.in_sum2", [1])], bytes(4)), "'a' needs .* suffix .counts"),
    "counts without sums": (raw.gguf([], [raw.tensor(b"a.counts", [1])], bytes(4)), "'a' needs .* suffix .in_sum2"),
    "sums of another type": (
        raw.gguf([], [raw.tensor(b"a.in_sum2", [1], 1), raw.tensor(b"a.counts", [1], 0, 32)], bytes(64)),
        "'a' needs a float32 tensor",
    ),
    "no counts": (raw.gguf([], sums(b"a", [1], [0]), bytes(64)), "'a' needs a float32 tensor .* .counts"),
    "sums that no counts divide": (raw.gguf([], sums(b"a", [3], [1, 2]), bytes(64)), "3 sums but 2 counts"),
    "negative counts": (
        raw.gguf([], sums(b"a", [1], [1]), floats(1) + bytes(28) + floats(-1)), "counts that are negative",
    ),
    "infinite counts": (
        raw.gguf([], sums(b"a", [1], [1]), floats(1) + bytes(28) + floats(INFINITE)), "counts that are negative or not",
    ),
    "infinite sums": (
        raw.gguf([], sums(b"a", [1], [1]), floats(INFINITE) + bytes(28) + floats(1)), "values that are negative or not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_an_error_that_names_file_and_fault(fault: str, tmp_path: Path) -> None:
    content, message = FAULTS[fault]
    path = tmp_path / "f.imatrix"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_imatrix(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_imatrix(tmp_path / "f")


@pytest.mark.parametrize("old", [False, True])
def test_bytes_cut_off_or_changed_give_a_reading_or_an_error(old: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "f", legacy=old)
    sound, chance = path.read_bytes(), random.Random(0)
    damaged = [sound[:length] for length in range(len(sound))]
    for _ in range(400):
        changed = bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(sound))] = chance.choice([0, 1, 255, chance.randrange(256)])
        damaged.append(bytes(changed))
    tracemalloc.start()
    for content in damaged:
        path.write_bytes(content)
        try:
            assert all((entry.values >= 0).all() for entry in read_imatrix(path).values())
        except CheckpointError:
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The damaged contents themselves are not counted: they are older. A reading needs a few hundred kilobytes at most.
    assert peak < 1 << 20


REFUSED: dict[str, tuple[dict[str, Importance], str]] = {
    "nothing": ({}, "needs at least one entry"),
    "float64": ({"a": Importance(torch.ones(1, 2).double(), torch.ones(1))}, "a: values torch.float64"),
    "one dimension": ({"a": Importance(torch.ones(2), torch.ones(2))}, r"a: values torch.float32 \[2\]"),
    "counts of another number": ({"a": Importance(torch.ones(2, 2), torch.ones(1))}, r"with counts \[1\] given"),
    "no values": ({"a": Importance(torch.ones(1, 0), torch.ones(1))}, r"\[1, 0\]"),
    "not finite": ({"a": importance([[NAN]], [1])}, "a: .* must be finite"),
    "negative": ({"a": importance([[-1.0]], [1])}, "a: .* not negative"),
    "a negative count": ({"a": importance([[1.0]], [-1])}, "a: .* not negative"),
    "sums beyond float32": ({"a": importance([[3e38]], [64])}, "a: its sums of squares are beyond float32"),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_stored_is_refused_and_leaves_no_file(fault: str, old: bool, tmp_path: Path) -> None:
    entries, message = REFUSED[fault]
    with pytest.raises(ContainerError, match=message):
        write(tmp_path / "f", entries, legacy=old)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("size", "count"), [(0, 1), (1, 2**32), (2**32, 1)])
def test_chunks_that_no_file_can_count_are_refused(size: int, count: int, old: bool, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="chunk|cannot be stored"):
        write_imatrix(tmp_path / "f", ENTRIES, dataset="", chunk_size=size, chunk_count=count, legacy=old)
