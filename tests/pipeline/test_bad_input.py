"""Whatever is wrong with what the user gives: an error that says so, and not a trace of an output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pennyweight.core.errors import (
    CheckpointError,
    ContainerError,
    DataError,
    ModelError,
    PennyweightError,
    SpaceError,
    UsageError,
    WeightError,
)
from pennyweight.pipeline.records import BlockDone
from tests.pipeline import tiny
from tests.pipeline.tiny import OPTIONS


@pytest.fixture
def mine(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def _fails(kind: type[PennyweightError], message: str, model: Path | str, tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(kind, match=message) as failed:
        tiny.run(Path(model), tmp_path / "out", replace(OPTIONS, **changes))
    text = str(failed.value)
    assert "\n" not in text
    assert tiny.traces(tmp_path) == []
    return text


def _edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def _without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def _truncate(model: Path) -> None:
    raw = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def _short_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:20])


def _lying_header(model: Path) -> None:
    file = model / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [31]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def _missing_shard(model: Path) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _one_tensor_less(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_without("config.json"), ModelError, "config.json"),
        (_without("model.safetensors"), ModelError, "holds no weights"),
        (_truncate, CheckpointError, "model.safetensors"),
        (_short_header, CheckpointError, "model.safetensors"),
        (_lying_header, CheckpointError, "model.norm.weight"),
        (_missing_shard, CheckpointError, "model-00001-of-00001.safetensors"),
        (_one_tensor_less, CheckpointError, "model.layers.1.mlp.up_proj.weight"),
        (lambda model: _edit_config(model, model_type="llama9"), ModelError, "llama9"),
        (lambda model: (model / "config.json").write_text("{"), ModelError, "not valid JSON"),
        (_without("tokenizer.json"), ModelError, "tokenizer"),
        (lambda model: (model / "tokenizer.json").write_text("{}"), ModelError, "tokenizer"),
    ],
)
def test_a_damaged_model_is_named(
    mine: Path, tmp_path: Path, damage: Callable[[Path], None], kind: type[ModelError], message: str
) -> None:
    damage(mine)
    assert str(mine) in _fails(kind, message, mine, tmp_path)


def test_weights_of_another_shape_than_the_config_says(mine: Path, tmp_path: Path) -> None:
    _edit_config(mine, hidden_size=64)
    _fails(CheckpointError, r"shape \(257, 32\), but the config asks for \(257, 64\)", mine, tmp_path)


def test_no_such_path(tmp_path: Path) -> None:
    _fails(ModelError, "there is no such path", tmp_path / "nowhere", tmp_path)


def test_a_file_is_no_model(mine: Path, tmp_path: Path) -> None:
    _fails(ModelError, "config.json", mine / "model.safetensors", tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.2.self_attn.v_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("calibration", [OPTIONS.calibration, "none"], ids=["text", "none"])
def test_a_weight_that_is_no_number_is_named(
    mine: Path, tmp_path: Path, bad: float, name: str, calibration: Any
) -> None:
    tensors = load_file(mine / "model.safetensors")
    tensors[name].view(-1)[3] = bad
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    text = _fails(WeightError, "NaN or infinite", mine, tmp_path, calibration=calibration, solver="nearest")
    assert text.startswith(f"{name}: 1 of ")


def test_text_shorter_than_one_window(model: Path, tmp_path: Path) -> None:
    _fails(DataError, "2 tokens, fewer than one window of 24", model, tmp_path, calibration=("ab",))


def test_text_that_is_not_there(model: Path, tmp_path: Path) -> None:
    _fails(DataError, "nothing.txt does not exist", model, tmp_path, calibration=str(tmp_path / "nothing.txt"))


def test_a_tokenizer_of_another_model(mine: Path, tmp_path: Path) -> None:
    tensors = load_file(mine / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:100].contiguous()
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    _edit_config(mine, vocab_size=100, bos_token_id=1, eos_token_id=1)
    _fails(DataError, "outside the model's vocabulary of 100", mine, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scheme="int4"), "'int4' is not the name of a scheme"),
        (dict(scheme="int9-g32"), "int9"),
        (dict(solver="magic"), "'magic' is not one of the solvers: gptaq, gptq, gptq-refined"),
        (
            dict(runtime="abacus"),
            "--for abacus: not a runtime that is supported; choose from llama.cpp, ",
        ),
        (dict(effort="utmost"), "--effort utmost: give fast, normal, best"),
        (dict(refine="magic"), "'magic' is not one of the solvers.learned"),
        (dict(calibration="none", recover=True), "--recover needs calibration data"),
        (dict(calibration="none", solver="gptq"), "--solver gptq needs calibration data"),
        (dict(fit="best"), "--fit best: give"),
        (dict(samples=0), "--samples 0"),
        (dict(recover_epochs=0.0), "--recover-epochs 0.0"),
        (dict(recover_epochs=float("nan")), "--recover-epochs nan"),
    ],
)
def test_misuse_is_seen_before_the_model_is_touched(tmp_path: Path, changes: Any, message: str) -> None:
    _fails(UsageError, message, tmp_path / "nowhere", tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scheme="uint4-g16"), "signed integers of 2 to 8 bits only"),
        (dict(scheme="int3-g32", runtime="vllm"), "vLLM runs packed integers of 4 and 8 bits only"),
        (dict(scheme="int4-g16-f16"), "float16 scales in a float32 model"),
    ],
)
def test_what_the_container_cannot_hold_is_said_in_a_sentence(
    model: Path, tmp_path: Path, changes: Any, message: str
) -> None:
    text = _fails(ContainerError, message, model, tmp_path, **changes)
    assert "model.layers.0.self_attn.q_proj" in text
    assert "k_proj" not in text


def test_a_group_size_that_does_not_fit_is_changed_and_recorded(model: Path, tmp_path: Path) -> None:
    report = tiny.run(model, tmp_path / "out", replace(OPTIONS, scheme="int4-g48"))
    assert len(report.changed) == 21
    assert "groups of 48 do not divide 32 inputs" in report.changed["model.layers.0.self_attn.q_proj"]


def test_gpt2_is_refused_in_a_sentence(tmp_path: Path) -> None:
    source = tiny.gpt2(tmp_path / "model")
    text = _fails(ContainerError, "GPT-2's weights are stored transposed", source, tmp_path)
    assert len(text) < 500


def test_an_output_that_is_not_empty_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("dear")
    with pytest.raises(UsageError, match="out exists and is not an empty directory"):
        tiny.run(model, tmp_path / "out")
    assert [file.read_text() for file in (tmp_path / "out").iterdir()] == ["dear"]
    with pytest.raises(UsageError, match="not an empty directory"):
        tiny.run(model, tmp_path / "out" / "mine.txt")


def test_an_output_whose_parent_is_missing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="far does not exist: create it"):
        tiny.run(model, tmp_path / "far" / "away")


def test_no_room_is_seen_before_the_first_block(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    told: list[BlockDone] = []
    with pytest.raises(SpaceError, match="and 100,000 are free"):
        tiny.run(model, tmp_path / "out", tell=told.append)
    assert told == []
    assert tiny.traces(tmp_path) == []


def test_a_weight_file_that_shrinks_while_it_is_read(mine: Path, tmp_path: Path) -> None:
    def cut(done: BlockDone) -> None:
        _truncate(mine)

    with pytest.raises(CheckpointError, match="it has become shorter since it was opened") as failed:
        tiny.run(mine, tmp_path / "out", tell=cut)
    assert "1 finished blocks are kept" in failed.value.__notes__[0]
    assert not (tmp_path / "out").exists()


def test_a_damaged_weight_far_into_the_model_leaves_nothing(mine: Path, tmp_path: Path) -> None:
    tensors = load_file(mine / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0] = torch.nan
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    _fails(WeightError, "model.layers.2.mlp.up_proj.weight: 32 of 2048", mine, tmp_path)
