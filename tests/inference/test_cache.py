"""Packed weights are kept in one file, which is whole, current and mapped, or made again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pennyweight as pw
from pennyweight.inference import cache, load
from pennyweight.inference.cache import DIRECTORY, cache_key, open_packed, write_packed
from pennyweight.inference.plan import packed
from pennyweight.schemes import parse_scheme
from tests.containers import artefacts
from tests.containers.artefacts import quantize_nearest
from tests.inference.loaded import logits


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    src = artefacts.llama(tmp_path / "model", intermediate_size=88)
    return artefacts.write(src, src.plan({"down": "int4-g8", "": "int4-g32"}), tmp_path / "out").directory


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pennyweight"


def _files(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else []


def test_the_second_load_packs_nothing_and_gives_the_same(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pw.load(artefact)
    file = artefact / DIRECTORY / "weights.packed"
    assert first.load_report.is_fresh
    assert (first.load_report.cache, first.load_report.cache_bytes) == (file, file.stat().st_size)
    assert f"packed weights are kept in {file}" in first.load_report.lines()[0]

    def never(*args: Any) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(load, "packed", never)
    monkeypatch.setattr(load, "find_shared", never)
    second = pw.load(artefact)
    assert not second.load_report.is_fresh
    assert second.load_report.shared == first.load_report.shared != []
    assert second.load_report.decoded == first.load_report.decoded != {}
    assert torch.equal(logits(first), logits(second))
    assert _files(artefact / DIRECTORY) == ["weights.packed"]


def test_what_is_mapped_lies_as_kernels_want_it_and_can_be_changed_without_harm(artefact: Path) -> None:
    pw.load(artefact)
    model = pw.load(artefact)
    file = artefact / DIRECTORY / "weights.packed"
    before = file.read_bytes()
    storages = [buffer for name, buffer in model.named_buffers() if name.endswith("storage")]
    assert len(storages) == 12
    assert all(storage.data_ptr() % 64 == 0 for storage in storages)
    for storage in storages:
        storage.zero_()
    for parameter in model.parameters():
        parameter.zero_()
    assert file.read_bytes() == before
    assert torch.equal(logits(pw.load(artefact)), logits(pw.load(artefact, cache=False)))


def test_without_a_cache_nothing_is_written(artefact: Path, user_cache: Path) -> None:
    model = pw.load(artefact, cache=False)
    assert (model.load_report.cache, model.load_report.cache_bytes, model.load_report.is_fresh) == (None, 0, True)
    assert not (artefact / DIRECTORY).exists()
    assert not user_cache.exists()


def _flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half of it": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "less than a header": lambda raw: raw[:40],
    "another magic": lambda raw: _flipped(raw, 0),
    "another position": lambda raw: _flipped(raw, 9),
    "another length": lambda raw: _flipped(raw, 17),
    "another checksum": lambda raw: _flipped(raw, 24),
    "the index": lambda raw: _flipped(raw, len(raw) - 3),
    "header of a weight": lambda raw: _flipped(raw, raw.index(b"PWPACKED") + 9),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_again(damage: str, artefact: Path) -> None:
    expected = logits(pw.load(artefact))
    file = artefact / DIRECTORY / "weights.packed"
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    again = pw.load(artefact)
    assert again.load_report.is_fresh
    assert torch.equal(logits(again), expected)
    assert file.read_bytes() == whole


def test_another_state_of_the_artefact_is_packed_anew(artefact: Path) -> None:
    pw.load(artefact)
    keys = [cache_key(artefact, [artefact / "model.safetensors"])]
    state = (artefact / "model.safetensors").stat()
    os.utime(artefact / "model.safetensors", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert pw.load(artefact).load_report.is_fresh
    keys.append(cache_key(artefact, [artefact / "model.safetensors"]))
    config = artefact / "config.json"
    config.write_text(config.read_text() + " ")
    assert pw.load(artefact).load_report.is_fresh
    keys.append(cache_key(artefact, [artefact / "model.safetensors"]))
    assert not pw.load(artefact).load_report.is_fresh
    assert len(set(keys)) == 3
    assert _files(artefact / DIRECTORY) == ["weights.packed"]


def test_where_the_artefact_cannot_be_written_the_users_cache_serves(artefact: Path, user_cache: Path) -> None:
    # A file where the directory would be: refuses root too.
    (artefact / DIRECTORY).write_text("")
    model = pw.load(artefact)
    assert model.load_report.cache is not None
    assert model.load_report.cache.parent == user_cache
    assert f"{artefact / DIRECTORY}" in model.load_report.notes[0]
    assert not pw.load(artefact).load_report.is_fresh


def test_a_full_disk_leaves_nothing_and_the_model_is_loaded(
    artefact: Path, user_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: Any, *args: Any) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    model = pw.load(artefact)
    assert model.load_report.cache is None
    assert [note for note in model.load_report.notes if "No space left on device" in note] == model.load_report.notes
    assert len(model.load_report.notes) == 2
    assert _files(artefact / DIRECTORY) == _files(user_cache) == []
    assert torch.equal(logits(model), logits(pw.load(artefact, cache=False)))


def test_an_interrupted_load_leaves_nothing_and_keeps_the_file_before(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pw.load(artefact)
    file = artefact / DIRECTORY / "weights.packed"
    before = file.read_bytes()
    (artefact / "config.json").write_text((artefact / "config.json").read_text() + " ")

    def interrupted(weight: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "packed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pw.load(artefact)
    assert _files(artefact / DIRECTORY) == ["weights.packed"]
    assert file.read_bytes() == before


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    matrix = packed(quantize_nearest(torch.randn(20, 48), parse_scheme("int3-g16").with_scale_dtype(torch.bfloat16)))
    floats = {kind: torch.randn(3, 5).to(kind) for kind in (torch.float32, torch.bfloat16, torch.float16)}

    def weights() -> Iterator[tuple[str, Any]]:
        yield "matrix", matrix
        yield from ((str(kind), tensor) for kind, tensor in floats.items())
        yield "empty", torch.empty(0, 4)
        yield "scalar", torch.tensor(2.0)

    path = tmp_path / "new" / "file"
    write_packed(path, "key", weights(), {"shared": [["a", "b"]], "said": []})
    found = open_packed(path, "key")
    assert found is not None
    assert found.size_bytes == path.stat().st_size
    assert found.notes == {"shared": [["a", "b"]], "said": []}
    assert torch.equal(found.weights["matrix"].storage, matrix.storage)  # type: ignore[union-attr]
    for kind, tensor in floats.items():
        assert _same(found.weights[str(kind)], tensor)
    assert _same(found.weights["empty"], torch.empty(0, 4))
    assert _same(found.weights["scalar"], torch.tensor(2.0))
    assert open_packed(path, "other") is None
    assert open_packed(tmp_path / "none", "key") is None


def _same(found: Any, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def test_what_is_kept_is_no_part_of_the_models_size(artefact: Path, tmp_path: Path) -> None:
    from pennyweight.evaluate.compare import directory_bytes

    before = directory_bytes(artefact)
    pw.load(artefact)
    assert directory_bytes(artefact) == before
    shutil.copytree(artefact, tmp_path / "copy")
    # A copy has other times: it is packed for itself.
    assert (tmp_path / "copy" / DIRECTORY).is_dir()
