from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from pennyweight.core.errors import CheckpointError, ModelError, ShapeError
from pennyweight.models import checkpoint as module
from pennyweight.models.base import TensorInfo
from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.safetensors_header import DTYPES
from tests.models.checkpoints import bits_of, entry, same_bits, stored, write_raw

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int32), "c": torch.ones(1)}
    save_file({"a": tensors["a"]}, directory / SHARDS[0])
    save_file({"b": tensors["b"], "c": tensors["c"]}, directory / SHARDS[1])
    write_index(directory, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    return tensors


def write_index(directory: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 44}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    # safetensors' own torch reader has no e8m0; it has a test of its own below.
    dtypes = sorted((dtype for name, dtype in DTYPES.items() if name != "F8_E8M0"), key=str)
    found = {}
    for name in draw(st.lists(st.text("abc.é_0", min_size=1, max_size=6), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(dtypes))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        high = 2 if dtype == torch.bool else 256
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
        found[name] = raw.view(dtype).reshape(shape)
    return found


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_every_tensor_reads_as_safetensors_itself_reads_it(saved: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = stored(Path(directory), saved)
        assert set(checkpoint.tensors) == set(saved)
        with safe_open(Path(directory) / "model.safetensors", "pt") as theirs:
            for name in saved:
                expected = theirs.get_tensor(name)
                assert checkpoint.tensors[name] == TensorInfo(expected.dtype, tuple(expected.shape))
                assert same_bits(checkpoint.read(name), expected)


@settings(max_examples=200, deadline=None)
@given(tensors(), st.none() | st.integers(-7, 7), st.none() | st.integers(-7, 7))
def test_a_part_is_the_slice_of_the_whole(saved: dict[str, torch.Tensor], first: int | None, last: int | None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = stored(Path(directory), saved)
        for name, tensor in saved.items():
            if tensor.dim():
                assert same_bits(checkpoint.read(name, slice(first, last)), tensor[first:last])


def test_e8m0_scales_are_read(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"s": entry(0, 3, dtype="F8_E8M0", shape=[3, 1])}, bytes([126, 127, 129]))
    found = open_checkpoint(tmp_path).read("s")
    assert found.dtype == torch.float8_e8m0fnu
    assert found.float().flatten().tolist() == [0.5, 1.0, 4.0]


def test_a_part_reads_only_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = stored(tmp_path, {"w": torch.arange(40, dtype=torch.int64).reshape(10, 4)})
    sizes = []
    plain = torch.empty

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(shape)
        return plain(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    assert checkpoint.read("w", slice(3, 5)).tolist() == [[12, 13, 14, 15], [16, 17, 18, 19]]
    assert sizes == [(2 * 4 * 8,)]


def test_what_is_read_is_fresh_memory(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, {"w": torch.ones(3)})
    checkpoint.read("w").zero_()
    assert checkpoint.read("w").tolist() == [1, 1, 1]


def test_reads_longer_than_the_system_moves_at_once_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_READ_BYTES", 7)
    w = torch.arange(100.0)
    assert same_bits(stored(tmp_path, {"w": w}).read("w"), w)


def test_many_threads_read_the_same_as_one(tmp_path: Path) -> None:
    saved = {str(i): torch.full((1000,), float(i)) for i in range(32)}
    checkpoint = stored(tmp_path, saved)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(checkpoint.read, list(saved) * 4))
    assert all(torch.equal(tensor, saved[name]) for tensor, name in zip(found, list(saved) * 4, strict=True))


def test_a_single_file_names_itself(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, {"w": torch.ones(3)})
    assert checkpoint.path == tmp_path
    assert checkpoint.decoded_from is None
    assert checkpoint.weight_files == [tmp_path / "model.safetensors"]


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    saved = sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weight_files == [tmp_path / shard for shard in SHARDS]
    assert set(checkpoint.tensors) == set(saved)
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in saved.items())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"lists 2 files, 1 of them missing: {SHARDS[1]}"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"a": SHARDS[0], "lost": SHARDS[1]})
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]}: does not hold the tensor 'lost'"):
        open_checkpoint(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    file = tmp_path / SHARDS[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]}: tensor '[bc]' ends at byte .*truncated"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", 3, "\0.safetensors"]
)
def test_an_index_cannot_lead_out_of_the_directory(shard: object, tmp_path: Path) -> None:
    write_index(tmp_path, {"a": shard})
    with pytest.raises(CheckpointError, match="places the tensor 'a' in"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\udcff"])
def test_an_index_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="model.safetensors.index.json: (cannot be read|has no 'weight_map')"):
        open_checkpoint(tmp_path)


def test_several_files_need_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds 2 safetensors files .* but no model.safetensors.index.json"):
        open_checkpoint(tmp_path)


def test_a_lone_shard_needs_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SHARDS[0])
    with pytest.raises(CheckpointError, match="no model.safetensors.index.json"):
        open_checkpoint(tmp_path)


def test_weights_under_another_name_are_refused_by_it(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="holds weights.safetensors, expected model.safetensors"):
        open_checkpoint(tmp_path)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="Merge it into its base model"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        ModelError, match=r"holds pytorch_model.bin but no safetensors.*save_pretrained\(directory, safe_"
    ):
        open_checkpoint(tmp_path)


def test_a_directory_without_weights_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights. Expected model.safetensors"):
        open_checkpoint(tmp_path)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: there is no such directory"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="model.safetensors: is a file"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_an_unknown_name_gets_the_nearest_one(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, {"model.embed.weight": torch.ones(1)})
    with pytest.raises(
        CheckpointError, match="no tensor 'model.embed.weigth'; the nearest name is 'model.embed.weight'"
    ):
        checkpoint.read("model.embed.weigth")


def test_a_file_truncated_after_opening_is_an_error(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, {"w": torch.ones(100)})
    file = checkpoint.weight_files[0]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="tensor 'w' has 400 bytes .* ended after 392: it has become shorter"):
        checkpoint.read("w")


def test_a_file_removed_after_opening_is_an_error_of_ours(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, {"w": torch.ones(100)})
    checkpoint.weight_files[0].unlink()
    with pytest.raises(CheckpointError, match="tensor 'w' cannot be read"):
        checkpoint.read("w")


def test_parts_are_plain_ranges_of_rows(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, {"w": torch.ones(4), "s": torch.tensor(1.0)})
    with pytest.raises(ShapeError, match="every 2th row"):
        checkpoint.read("w", slice(0, 4, 2))
    with pytest.raises(ShapeError, match="scalar has no rows"):
        checkpoint.read("s", slice(0, 1))


def test_the_bytes_of_a_tensor_are_what_the_tests_compare() -> None:
    assert bits_of(torch.tensor([float("nan")])).numel() == 4
