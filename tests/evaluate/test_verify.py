"""What an artefact must pass: its own runtime, in a fresh process; and what it must not."""

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

from pennyweight.core.errors import ModelError, PennyweightError, VerificationError
from pennyweight.core.memory import peak_memory_bytes
from pennyweight.evaluate import proved, verify_worker
from pennyweight.evaluate.verify import Extent, verify
from tests.pipeline import tiny

PACKED = "model.layers.1.mlp.up_proj.weight_packed"


@pytest.fixture
def mine(artefact: Path, tmp_path: Path) -> Path:
    """A copy that a test may tamper with."""
    return Path(shutil.copytree(artefact, tmp_path / "mine"))


def _edit_tensors(artefact: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(artefact / "model.safetensors")
    edit(tensors)
    save_file(tensors, artefact / "model.safetensors", metadata={"format": "pt"})


def _edit_settings(artefact: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((artefact / "config.json").read_text())
    edit(config["quantization_config"])
    (artefact / "config.json").write_text(json.dumps(config))


def _flip_codes(artefact: Path) -> None:
    _edit_tensors(artefact, lambda tensors: tensors[PACKED].bitwise_xor_(0x11))


def _rename(artefact: Path) -> None:
    _edit_tensors(artefact, lambda tensors: tensors.update(other=tensors.pop(PACKED)))


def _remove_norm(artefact: Path) -> None:
    _edit_tensors(artefact, lambda tensors: tensors.pop("model.norm.weight"))


def _remove_scale(artefact: Path) -> None:
    _edit_tensors(artefact, lambda tensors: tensors.pop(PACKED.replace("packed", "scale")))


def _double_group(artefact: Path) -> None:
    _edit_settings(artefact, lambda settings: settings["config_groups"]["group_0"]["weights"].update(group_size=32))


def _other_width(artefact: Path) -> None:
    _edit_settings(artefact, lambda settings: settings["config_groups"]["group_0"]["weights"].update(num_bits=4))


def _ignore_more(artefact: Path) -> None:
    _edit_settings(artefact, lambda settings: settings["ignore"].append(PACKED.removesuffix(".weight_packed")))


def _target_less(artefact: Path) -> None:
    _edit_settings(artefact, lambda settings: settings["config_groups"]["group_0"].update(targets=["re:.*q_proj"]))


TAMPERINGS = [
    _flip_codes,
    _rename,
    _remove_norm,
    _remove_scale,
    _double_group,
    _other_width,
    _ignore_more,
    _target_less,
]
BY_NAME = pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda tamper: tamper.__name__)


@BY_NAME
def test_a_tampered_artefact_is_not_what_its_record_says(mine: Path, tamper: Callable[[Path], None]) -> None:
    tamper(mine)
    file = "config.json" if "settings" in tamper.__code__.co_names[0] else "model.safetensors"
    with pytest.raises(VerificationError, match=f"{file} is not the file that was written: its SHA-256"):
        verify(mine)


def test_a_missing_file_is_named_and_an_edited_card_is_not(mine: Path) -> None:
    (mine / "README.md").write_text("my own card")
    (mine / "LICENSE").unlink()
    with pytest.raises(VerificationError, match=": LICENSE is missing$"):
        verify(mine)


def test_a_damaged_record_is_named(mine: Path) -> None:
    (mine / "pennyweight.json").write_text('{"outputs": 7}')
    with pytest.raises(ModelError, match="pennyweight.json is damaged"):
        verify(mine)


def _worker(artefact: Path, extent: Extent, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The fresh process's work done in this one, which takes no seconds of imports."""
    capsys.readouterr()
    verify_worker.main([str(artefact), extent])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize("extent", ["full", "blocks"])
@pytest.mark.parametrize("tamper", TAMPERINGS[1:], ids=lambda tamper: tamper.__name__)
def test_without_a_record_the_runtime_itself_betrays_tampering(
    mine: Path, tamper: Callable[[Path], None], extent: Extent, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(mine)
    try:
        problems = _worker(mine, extent, capsys)["problems"]
    except (PennyweightError, RuntimeError, ValueError) as error:
        # Refused by our own reading of it, or by the runtime's: the fresh process ends with this.
        problems = [str(error)]
    assert any(problems)


def test_an_untouched_artefact_has_no_difference_in_float32(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = _worker(artefact, "full", capsys)
    assert (found["verified"], found["dtype"], found["problems"]) == ("full", "float32", [])
    assert found["largest_difference"] == found["allowed_difference"] == 0


@pytest.mark.parametrize("scheme", ["int4-g16", "int4-g16-asym", "int5-channel", "int8-tensor", "int2-g16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_types_differ_by_a_unit_in_the_last_place_at_most(
    tmp_path: Path, dtype: torch.dtype, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.llama(tmp_path / "model", dtype=dtype)
    tiny.run(source, tmp_path / "out", replace(tiny.OPTIONS, scheme=scheme))
    for extent in ("full", "blocks"):
        found = _worker(tmp_path / "out", extent, capsys)  # type: ignore[arg-type]
        assert found["problems"] == []
        assert found["verified"] == ("full" if extent == "full" else "partial")
    assert verify_worker._unit_in_last_place(torch.tensor([1.5, -3.0], dtype=dtype)) == 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("make", [tiny.mixtral, tiny.opt, tiny.neox], ids=["mixtral", "opt", "gpt-neox"])
def test_other_architectures_verify(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.run(make(tmp_path / "model"), tmp_path / "out")
    full, blocks = (_worker(tmp_path / "out", extent, capsys) for extent in ("full", "blocks"))  # type: ignore[arg-type]
    assert full["problems"] == blocks["problems"] == []
    assert blocks["weights_compared"] == len(json.loads((tmp_path / "out/pennyweight.json").read_text())["sites"])


def test_a_runtime_that_computes_with_other_weights_is_caught(
    artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify_worker._run_runtime

    def off_by_a_little(*args: Any, **kwargs: Any) -> Any:
        seen = real(*args, **kwargs)
        return replace(seen, logits=seen.logits * (1 + 1e-6))

    monkeypatch.setattr(verify_worker, "_run_runtime", off_by_a_little)
    [problem] = _worker(artefact, "full", capsys)["problems"]
    assert "the runtime computes with other weights" in problem


def test_what_does_not_fit_in_memory_is_verified_in_part(
    artefact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_worker, "available_memory_bytes", lambda: 1000)
    found = _worker(artefact, "full", capsys)
    assert (found["verified"], found["reason"]) == ("partial", "the decoded model does not fit in memory")
    assert found["weights_compared"] == 21


def test_a_tensor_that_the_original_has_no_place_for_either_is_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.llama(tmp_path / "model")
    _edit_tensors(source, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    tiny.run(source, tmp_path / "out")
    assert json.loads((tmp_path / "out/pennyweight.json").read_text())["unused_tensors"] == ["model.extra.weight"]
    assert _worker(tmp_path / "out", "full", capsys)["problems"] == []


def test_the_fresh_process_agrees_and_has_its_own_peak(artefact: Path) -> None:
    ballast = torch.ones(150_000_000)
    found = verify(artefact)
    assert found["verified"] == "full"
    assert "problems" not in found
    assert found["runtime"].startswith("transformers ")
    # What this process has held must not count as the other one's.
    assert found["peak_memory_bytes"] < peak_memory_bytes() - ballast.nbytes // 2


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        verify(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no config.json"):
        verify(tmp_path)


def test_no_verification_opens_nothing(tmp_path: Path) -> None:
    assert verify(tmp_path / "nowhere", extent="none") == {"verified": "none"}


@pytest.mark.parametrize(
    ("signal", "why", "less"),
    [(9, "probably for lack of memory", True), (4, "its library is built for another processor", False)],
)
def test_a_killed_runtime_says_why_and_what_helps(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: int, why: str, less: bool
) -> None:
    script = tmp_path / "killed.sh"
    script.write_text(f"#!/bin/sh\nkill -{signal} $$\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(VerificationError, match=f"killed by signal {signal}, {why}") as told:
        verify(artefact)
    assert ("blocks" in str(told.value)) == less


def test_the_main_job_proves_itself_and_is_honest_about_vllm(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, Any]] = []

    def fake(directory: Path, *, extent: Extent, trust_remote_code: bool) -> dict[str, Any]:
        asked.append((extent, trust_remote_code))
        return {"verified": "full"}

    monkeypatch.setattr(proved, "verify", fake)
    report = proved.quantize(
        original, tmp_path / "out", scheme="int4-g32", runtime="vllm", calibration=[tiny.words()], length=24
    )
    assert asked == [("blocks", False)]
    assert "not verified in vllm" in report.verification["reason"]
    assert "Not verified in vLLM." in (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "pennyweight.json").read_text())
    assert record["verification"] == report.verification


_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class TinyConfig(LlamaConfig):
    model_type = "tiny-of-its-own"
class TinyModel(LlamaForCausalLM):
    config_class = TinyConfig
"""


@pytest.mark.slow
def test_a_models_own_code_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = tiny.llama(tmp_path / "model")
    (source / "own_code.py").write_text(_CODE)
    config = json.loads((source / "config.json").read_text())
    config |= {
        "model_type": "tiny-of-its-own",
        "architectures": ["TinyModel"],
        "auto_map": {"AutoConfig": "own_code.TinyConfig", "AutoModelForCausalLM": "own_code.TinyModel"},
    }
    (source / "config.json").write_text(json.dumps(config))
    how: dict[str, Any] = dict(scheme="int4-g16", calibration=[tiny.words()], length=24)
    with pytest.raises(ModelError, match="trust"):
        proved.quantize(source, tmp_path / "out", **how)
    report = proved.quantize(source, tmp_path / "out", **how, trust_remote_code=True)
    assert report.verified == "full"
    assert (tmp_path / "out" / "own_code.py").exists()
    assert json.loads((tmp_path / "out/pennyweight.json").read_text())["recipe"]["trust_remote_code"] is True
