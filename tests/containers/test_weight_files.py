"""Files written tensor by tensor are what safetensors' own reader expects."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pennyweight.containers.weight_files import INDEX_NAME, WeightFiles, tensor_bytes
from pennyweight.core.errors import ContainerError, ShapeError
from pennyweight.models.base import TensorInfo

TENSORS: dict[str, Tensor] = {
    "block.0.weight_packed": torch.arange(-30, 30, dtype=torch.int32).reshape(6, 10),
    "block.0.weight_scale": torch.linspace(-1, 1, 18).to(torch.bfloat16).reshape(6, 3),
    "block.0.weight_shape": torch.tensor([6, 80]),
    "block.0.zero": torch.tensor([-3], dtype=torch.int8),
    "empty": torch.empty(0, 4),
    "norm": torch.tensor(2.5, dtype=torch.float64),
    'émbed "x"': torch.linspace(0, 1, 21).half().reshape(7, 3),
}


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def filled(layout: WeightFiles, directory: Path, tensors: dict[str, Tensor]) -> None:
    with layout.create(directory) as files:
        for name in reversed(tensors):
            files.write(name, tensors[name])
        files.flush()


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_one_file_is_read_by_safetensors(tmp_path: Path) -> None:
    layout = WeightFiles.plan(infos(TENSORS))
    filled(layout, tmp_path, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_size == layout.size_bytes
    check_same(load_file(tmp_path / "model.safetensors"), TENSORS)
    with safe_open(tmp_path / "model.safetensors", "pt") as reader:
        assert reader.metadata() == {"format": "pt"}


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(1, 700))
def test_several_files_hold_everything_in_order(limit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("shards")
    layout = WeightFiles.plan(infos(TENSORS), max_file_bytes=limit)
    filled(layout, directory, TENSORS)
    files = sorted(directory.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in directory.iterdir()) == layout.size_bytes
    merged = {name: tensor for path in files for name, tensor in load_file(path).items()}
    check_same({name: merged[name] for name in TENSORS}, TENSORS)
    if len(files) > 1:
        assert [path.name for path in files] == [
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
        ]
        index = json.loads((directory / INDEX_NAME).read_text())
        assert list(index["weight_map"]) == list(TENSORS)
        assert list(index["weight_map"].values()) == sorted(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(info.size_bytes for info in infos(TENSORS).values())
    # A file is over the limit only if its one tensor is.
    for path in files:
        held = infos(load_file(path)).values()
        assert sum(info.size_bytes for info in held) <= limit or sum(info.size_bytes > 0 for info in held) == 1


@pytest.mark.parametrize("length", range(1, 9))
def test_headers_end_at_a_multiple_of_eight_bytes(length: int) -> None:
    layout = WeightFiles.plan({"n" * length: TensorInfo(torch.float32, (2,))})
    assert len(layout.headers["model.safetensors"]) % 8 == 0


def test_tensors_are_adjacent_and_in_order() -> None:
    layout = WeightFiles.plan(infos(TENSORS))
    end = len(layout.headers["model.safetensors"])
    for name in TENSORS:
        assert layout.places[name].offset == end
        end += layout.places[name].info.size_bytes
    assert end == layout.size_bytes


def test_a_fresh_file_is_already_valid_and_holds_zeros(tmp_path: Path) -> None:
    WeightFiles.plan(infos(TENSORS)).create(tmp_path).close()
    check_same(load_file(tmp_path / "model.safetensors"), {n: torch.zeros_like(t) for n, t in TENSORS.items()})


def test_chunks_and_threads_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    layout = WeightFiles.plan(infos(TENSORS), max_file_bytes=200)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    filled(layout, tmp_path / "a", TENSORS)
    pieces = [
        (name, start, bytes(tensor_bytes(tensor)[start : start + 7]))
        for name, tensor in TENSORS.items()
        for start in range(0, tensor.nbytes, 7)
    ]
    with layout.create(tmp_path / "b") as files, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: files.write_chunk(*piece), reversed(pieces)))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("rows", [slice(None), slice(1, 3), slice(2, 2), slice(3, 1), slice(-1, None), slice(2, 99)])
def test_rows_are_read_by_themselves(rows: slice, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(7), "b": torch.randn(4, 3, 2)}
    entries = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with WeightFiles.plan(entries).create(tmp_path) as files:
        for name, tensor in tensors.items():
            files.write(name, tensor)
        assert torch.equal(files.read("b", rows), tensors["b"][rows])


def test_a_system_that_takes_no_advice_writes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise OSError(errno.EINVAL, "no such advice")

    monkeypatch.setattr(os, "posix_fadvise", refused, raising=False)
    tensor = torch.randn(50, 3)
    with WeightFiles.plan({"a": TensorInfo(tensor.dtype, tuple(tensor.shape))}).create(tmp_path) as files:
        files.write("a", tensor)
        hashes = files.sha256()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], tensor)
    assert hashes == {"model.safetensors": hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()}


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    tensors = {name: torch.randn(50, 3) for name in "abc"}
    entries = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    layout = WeightFiles.plan(entries, max_file_bytes=1000)

    def expected() -> dict[str, str]:
        return {file: hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in layout.sizes}

    with layout.create(tmp_path) as files:
        for name in "abc":
            files.write(name, tensors[name])
            files.flush()
        assert files.sha256() == expected()
        files.write("b", tensors["a"])
        assert files.sha256() == expected()
    with layout.reopen(tmp_path) as files:
        files.write("c", tensors["a"])
        assert files.sha256() == expected()


def test_an_unfinished_directory_continues_where_it_was(tmp_path: Path) -> None:
    layout = WeightFiles.plan(infos(TENSORS), max_file_bytes=200)
    first, *rest = TENSORS
    with layout.create(tmp_path) as files:
        files.write(first, TENSORS[first])
    with WeightFiles.plan(infos(TENSORS), max_file_bytes=200).reopen(tmp_path) as files:
        assert torch.equal(files.read(first), TENSORS[first])
        for name in rest:
            files.write(name, TENSORS[name])
        check_same({name: files.read(name) for name in TENSORS}, TENSORS)


def test_another_plan_a_short_file_and_a_missing_one_are_not_continued(tmp_path: Path) -> None:
    layout = WeightFiles.plan(infos(TENSORS))
    layout.create(tmp_path).close()
    with pytest.raises(ContainerError, match="other tensors"):
        WeightFiles.plan(infos(TENSORS | {"norm": torch.zeros(2, dtype=torch.float32)})).reopen(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.truncate(layout.size_bytes - 1)
    with pytest.raises(ContainerError, match="other tensors"):
        layout.reopen(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ContainerError, match="missing"):
        layout.reopen(tmp_path)


def test_files_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        WeightFiles.plan(infos(TENSORS)).create(tmp_path)


def test_what_was_not_planned_is_refused(tmp_path: Path) -> None:
    with WeightFiles.plan(infos(TENSORS)).create(tmp_path) as files:
        with pytest.raises(ShapeError, match=r"norm: torch.float32 \(\) given"):
            files.write("norm", torch.tensor(1.0))
        with pytest.raises(ShapeError, match=r"\(3, 6\) given"):
            files.write("block.0.weight_scale", TENSORS["block.0.weight_scale"].T)
        with pytest.raises(ShapeError, match="8 bytes at 1 given"):
            files.write_chunk("norm", 1, b"12345678")
        with pytest.raises(ContainerError, match="other: not among"):
            files.write("other", torch.tensor(1.0))
    with pytest.raises(ContainerError, match="complex64"):
        WeightFiles.plan({"c": TensorInfo(torch.complex64, (1,))})


def test_strided_tensors_are_written_in_row_order(tmp_path: Path) -> None:
    tensor = torch.arange(12).reshape(3, 4).T
    with WeightFiles.plan(infos({"t": tensor})).create(tmp_path) as files:
        files.write("t", tensor)
        assert torch.equal(files.read("t"), tensor)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["t"], tensor)
