"""Recovery as the last part of a run: in place, complete or not at all, and right in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pennyweight.evaluate import proved
from pennyweight.evaluate.compare import evaluate
from pennyweight.evaluate.verify import verify
from pennyweight.pipeline.job import Job
from pennyweight.pipeline.journal import Journal
from pennyweight.pipeline.output import Output
from pennyweight.train.recovery import finish
from pennyweight.train.recovery.finish import Recovery
from pennyweight.train.recovery.recover import Settings
from tests.pipeline import tiny

SETTINGS = Settings(epochs=2, batch=1, rate=5e-3, held_out=3, checks=2, tokens=32)
OPTIONS = replace(tiny.OPTIONS, scheme="int3-g16", samples=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("original") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "out"
    tiny.run(model, out, OPTIONS)
    return out


@pytest.fixture(scope="module")
def recovered(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recovered") / "out"
    tiny.run(model, out, OPTIONS, finish=Recovery(SETTINGS))
    return out


def test_the_result_is_nearer_to_the_original_and_transformers_agrees(
    model: Path, plain: Path, recovered: Path, tmp_path: Path
) -> None:
    assert verify(recovered)["verified"] == "full"
    text = tiny.text_file(tmp_path, count=200, seed=3)
    before, after = (
        evaluate(str(out), against=str(model), source=text, length=24).kl_mean for out in (plain, recovered)
    )
    assert before is not None
    assert after is not None
    assert after < 0.95 * before


def test_only_scales_and_norms_change_and_sizes_do_not(plain: Path, recovered: Path) -> None:
    before, after = (load_file(out / "model.safetensors") for out in (plain, recovered))
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {
        name: (t.shape, t.dtype) for name, t in after.items()
    }
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert all(name.endswith(("weight_scale", "norm.weight")) for name in changed)


def test_the_record_says_what_was_found(recovered: Path) -> None:
    record = json.loads((recovered / "pennyweight.json").read_text())
    found = record["found"]["finish"]
    assert found["held_out_after"] < found["held_out_before"]
    assert 0 < found["best_step"] <= found["steps"]
    assert "rate=0.005" in record["recipe"]["finish"]
    left = {file.name for file in recovered.iterdir()}
    assert not left & {"finish", "journal.jsonl"}


class _Killed(BaseException):
    """Nothing is expected to survive this but what is on disk."""


@pytest.mark.parametrize(
    "moment",
    ["while it trains", "before the new values are whole", "while they are written", "just before the journal"],
)
def test_a_killed_recovery_ends_with_the_same_bytes(
    model: Path, recovered: Path, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _kill(patch, moment)
        with pytest.raises(_Killed):
            tiny.run(model, out, OPTIONS, finish=Recovery(SETTINGS))
    assert not out.exists()
    report = tiny.run(model, out, OPTIONS, finish=Recovery(SETTINGS))
    assert report.resumed_blocks == 2
    assert tiny.digests(out) == tiny.digests(recovered)


def _kill(patch: pytest.MonkeyPatch, moment: str) -> None:
    def killed(*_: Any, **__: Any) -> Any:
        raise _Killed

    def half_applied(redo: Path, output: Any) -> Any:
        tensors = load_file(redo)
        name = next(name for name in tensors if name.endswith("weight_scale"))
        output.files.write(name, tensors[name])
        raise _Killed

    match moment:
        case "while it trains":
            patch.setattr("pennyweight.train.recovery.student.Student.slopes", killed)
        case "before the new values are whole":
            patch.setattr(finish.os, "replace", killed)
        case "while they are written":
            patch.setattr(finish, "_apply", half_applied)
        case _:
            add = Journal.add
            patch.setattr(
                Journal, "add", lambda self, part, *a, **k: (killed if part == "finish" else add)(self, part, *a, **k)
            )


def test_another_recovery_does_not_continue_this_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        _kill(patch, "while it trains")
        with pytest.raises(_Killed):
            tiny.run(model, out, OPTIONS, finish=Recovery(SETTINGS))
    assert tiny.run(model, out, OPTIONS).leftovers


def test_without_steps_the_bytes_are_those_of_a_run_without_recovery(model: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny.run(model, out, OPTIONS, finish=Recovery(replace(SETTINGS, epochs=0)))
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_what_is_trained_is_the_model_that_was_written(tmp_path: Path) -> None:
    """Of a mixture of experts a transform rewrites routers too, which are matrices that are kept."""
    source = tiny.mixtral(tmp_path / "model")
    trained: dict[str, Any] = {}

    class Look:
        name = "look"

        def check(self, job: Job) -> None:
            assert job.windows is not None

        def __call__(self, job: Job, output: Output, scratch: Path) -> dict[str, Any]:
            model = finish._as_written(job, output)
            for name in output.kept_tensors(job.model.sites):
                trained[name] = (model.checkpoint.read(name), output.files.read(name), job.model.checkpoint.read(name))
            return {}

    tiny.run(source, tmp_path / "out", replace(OPTIONS, transform="smoothquant"), finish=Look())
    routers = [name for name in trained if name.endswith("gate.weight")]
    assert len(routers) == 3
    assert not any(torch.equal(trained[name][1], trained[name][2]) for name in routers)
    for name, (read, written, _) in trained.items():
        assert torch.equal(read, written), name


def test_how_long_is_an_option(model: Path, tmp_path: Path) -> None:
    source = tiny.text_file(tmp_path, count=3000, seed=1)
    steps = []
    for epochs in (1.0, 2.0):
        out = tmp_path / f"{epochs}"
        proved.quantize(
            str(model), out, scheme="int3-g16", solver="nearest", calibration=source, samples=200, length=24,
            recover=True, recover_epochs=epochs, verification="none",
        )  # fmt: skip
        record = json.loads((out / "pennyweight.json").read_text())
        assert f"epochs={epochs}" in record["recipe"]["finish"]
        steps.append(record["found"]["finish"]["steps"])
    assert steps[0] >= 1
    assert steps[1] >= 2 * steps[0]
