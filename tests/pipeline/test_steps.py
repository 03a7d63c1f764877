"""The steps around the solver of single sites: what each changes, and that none breaks the promises of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pennyweight.core import registry
from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.evaluate.verify import verify
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.records import BlockDone
from pennyweight.train.recovery.finish import Recovery
from pennyweight.train.recovery.recover import Settings
from tests.pipeline import tiny
from tests.pipeline.tiny import OPTIONS

STEPS: dict[str, Options] = {
    "rotated": replace(OPTIONS, solver="gptq", rotate=True),
    "staged": replace(OPTIONS, solver="qronos", staged=True),
    "awq": replace(OPTIONS, solver="gptq", transform="awq"),
    "smoothquant": replace(OPTIONS, solver="nearest", transform="smoothquant"),
    "signed-gradient": replace(OPTIONS, solver="gptq", refine="signed-gradient"),
    "all": replace(OPTIONS, solver="qronos", staged=True, transform="awq", refine="sigmoid"),
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned rounding long enough to change codes."""

    def find(folder: str, name: str) -> Any:
        found = registry.find(folder, name)
        return replace(found, steps=8) if folder == "solvers.learned" else found

    monkeypatch.setattr("pennyweight.pipeline.options.find", find)


every_step = pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)


class _Stop(Exception):
    pass


def _stop_after_the_first(done: BlockDone) -> None:
    if done.index == 0:
        raise _Stop


@every_step
def test_a_run_that_was_ended_goes_on_to_the_same_bytes_on_any_number_of_threads(
    model: Path, tmp_path: Path, options: Options
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        tiny.run(model, tmp_path / "whole", options)
        torch.set_num_threads(2)
        with pytest.raises(_Stop):
            tiny.run(model, tmp_path / "out", options, tell=_stop_after_the_first)
        assert tiny.run(model, tmp_path / "out", options).resumed_blocks == 1
    finally:
        torch.set_num_threads(before)
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "whole")


@pytest.mark.parametrize("step", ["rotated", "awq", "signed-gradient"])
def test_the_runtime_computes_what_was_written(model: Path, tmp_path: Path, step: str) -> None:
    tiny.run(model, tmp_path / "out", STEPS[step])
    with one_thread_per_operation():
        assert verify(tmp_path / "out")["verified"] == "full"


def _tensors(directory: Path) -> dict[str, Any]:
    return load_file(next(directory.glob("*.safetensors")))


def test_a_transform_changes_norms_and_says_which_folds(model: Path, tmp_path: Path) -> None:
    tiny.run(model, tmp_path / "out", STEPS["awq"])
    original, now = _tensors(model), _tensors(tmp_path / "out")
    norms = [name for name in now if name.endswith("layernorm.weight")]
    assert norms
    assert any(not torch.equal(now[name], original[name]) for name in norms)
    record = json.loads((tmp_path / "out" / "pennyweight.json").read_text())
    assert record["recipe"]["transform"] == "awq"
    folds = [line for block in range(3) for line in record["found"][f"block {block}"]["rescaled"]]
    assert any("input_layernorm.weight -> " in line for line in folds)


def test_recovery_goes_on_from_the_norms_that_a_transform_has_left(model: Path, tmp_path: Path) -> None:
    never = Settings(rate=0.0, held_out=2, checks=1)
    steps = replace(STEPS["awq"], samples=120)
    tiny.run(model, tmp_path / "plain", steps)
    tiny.run(model, tmp_path / "out", steps, finish=Recovery(never))
    plain, now = _tensors(tmp_path / "plain"), _tensors(tmp_path / "out")
    assert all(torch.equal(now[name], plain[name]) for name in plain)
    tiny.run(model, tmp_path / "trained", steps, finish=Recovery(replace(never, rate=1e-3)))
    before, after = (_found(tmp_path / name) for name in ("out", "trained"))
    assert after["held_out_before"] == before["held_out_before"]
    assert after["held_out_after"] < after["held_out_before"]


def _found(directory: Path) -> dict[str, float]:
    record = json.loads((directory / "pennyweight.json").read_text())
    found: dict[str, float] = record["found"]["finish"]
    return found


def test_refining_lowers_the_error_of_the_blocks_outputs(model: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, scheme="int3-g16", solver="nearest", calibration=OPTIONS.calibration)
    tiny.run(model, tmp_path / "start", options)
    tiny.run(model, tmp_path / "refined", replace(options, refine="signed-gradient"))
    start, refined = _tensors(tmp_path / "start"), _tensors(tmp_path / "refined")
    assert start.keys() == refined.keys()
    packed = [name for name in start if name.endswith("weight_packed")]
    assert any(not torch.equal(start[name], refined[name]) for name in packed)
