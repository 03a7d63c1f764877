"""Every command: its one JSON object, its words for people, and how it ends."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from pennyweight.cli import console
from pennyweight.cli.main import app
from pennyweight.core.errors import UsageError
from pennyweight.pipeline.records import RunReport
from tests.pipeline import tiny

Command = Callable[..., Result]
COMMANDS = [command.name for command in app.registered_commands]
QUICK = ("--scheme", "int4-g16", "--length", 24, "--verify", "none")


def _json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_quantize_prints_one_json_object(pennyweight: Command, model: Path, text: str, tmp_path: Path) -> None:
    result = pennyweight("quantize", model, "--out", tmp_path / "out", "--calibration", text, *QUICK, "--json")
    found = _json(result)
    promised = {"out", "size_bytes", "budget_bytes", "bpw", "sites", "kept", "fallbacks", "seconds",
                "peak_memory_bytes", "verified"}  # fmt: skip
    assert promised <= found.keys()
    assert (found["sites"], found["verified"]) == (21, "none")
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["block 1/3", "block 2/3", "block 3/3"]
    assert "q_proj" in lines[0]
    assert "x nearest" in lines[0]


def test_quantize_says_what_happened(pennyweight: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.work-000000000000").mkdir()
    result = pennyweight("quantize", model, "--out", tmp_path / "out", "--solver", "nearest", "--bits", 3, *QUICK[4:])
    assert result.exit_code == 0, result.output
    # Groups of 32 (4 bits a weight) where there are 32 inputs, of 64 (3.5 bits) in down_proj: 7 to 2 by weights.
    assert "21 weights quantized at 3.889 bits, scales included" in result.stdout
    assert (
        "changed for 18: int3-g32-f32 in place of int3-g128-f32: groups of 128 do not divide 32 inputs" in result.stdout
    )
    assert ".out.work-000000000000" in result.stdout
    assert "verified: none" in result.stdout


def test_plan_prints_one_json_object_and_leaves_what_quantize_takes(
    pennyweight: Command, model: Path, text: str, tmp_path: Path
) -> None:
    asked = ("--calibration", text, "--length", 24)
    found = _json(pennyweight("plan", model, "--bpw", 12, "--out", tmp_path / "plan", *asked, "--json"))
    assert found["files"] == ["plan.json", "frontier.json", "frontier.svg"]
    assert found["smallest_bytes"] < found["size_bytes"] < found["largest_bytes"]
    assert 11.85 < found["bpw"] <= 12
    assert len(found["plan"]) == found["sites"] == 22
    losses = [point["predicted_loss"] for point in found["frontier"]]
    assert losses == sorted(losses, reverse=True)
    given = ("--plan", tmp_path / "plan" / "plan.json", "--verify", "none", *asked)
    made = _json(pennyweight("quantize", model, "--out", tmp_path / "out", *given, "--json"))
    assert made["bpw"] == pytest.approx(found["bpw"], abs=1e-3)
    words = pennyweight("plan", model, "--bpw", 12, *asked)
    assert "predicted loss" in words.stdout
    assert "--bpw 12: " in words.stdout
    assert "down_proj: " in words.stdout
    assert not any(name.name == "plan" for name in tmp_path.glob("plan/plan"))


def test_a_budget_of_loss_is_kept_and_its_evidence_recorded(
    pennyweight: Command, model: Path, text: str, tmp_path: Path
) -> None:
    asked = ("--calibration", text, "--length", 24, "--samples", 12, "--effort", "fast", "--verify", "none")
    limit = 0.005
    result = pennyweight("quantize", model, "--out", tmp_path / "out", "--max-kl", limit, *asked, "--json")
    made = _json(result)
    assert result.stderr.count("trial: ") >= 2
    record = json.loads((tmp_path / "out" / "pennyweight.json").read_text())
    evidence = record["found"]["budget"]
    held = [trial for trial in evidence["trials"] if trial["holds"]]
    assert evidence["budget"] == "--max-kl 0.005"
    assert held
    assert all((trial["upper"] <= limit) == trial["holds"] for trial in evidence["trials"])
    assert all(trial["loss"] < trial["upper"] for trial in evidence["trials"])
    assert all((trial["loss"] <= limit < trial["upper"]) == trial["is_open"] for trial in evidence["trials"])
    assert result.stderr.count("more to judge on would tell") == sum(trial["is_open"] for trial in evidence["trials"])
    assert evidence["tokens"] == 24 * evidence["windows"] > 0
    # What was written is the smallest plan that held.
    assert made["bpw"] < 32
    assert record["recipe"]["plan"]
    found = _json(
        pennyweight("evaluate", tmp_path / "out", "--against", model, "--text", text, "--length", 24, "--json")
    )
    assert found["kl_mean"] <= limit
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_evaluate_prints_one_json_object(pennyweight: Command, model: Path, artefact: Path, text: str) -> None:
    found = _json(pennyweight("evaluate", artefact, "--against", model, "--text", text, "--length", 24, "--json"))
    promised = {"perplexity", "reference_perplexity", "kl_mean", "kl_stderr", "top1_agreement", "tokens", "context",
                "size_bytes", "bpw"}  # fmt: skip
    assert promised <= found.keys()
    assert found["context"] == 24
    words = pennyweight("evaluate", artefact, "--against", model, "--text", text, "--length", 24, "--samples", 1)
    assert "23 tokens in 1 windows of 24, stride 24" in words.stdout
    assert "standard error inf" in words.stdout


def test_inspect_prints_one_json_object(pennyweight: Command, model: Path) -> None:
    found = _json(pennyweight("inspect", model, "--json"))
    assert (found["blocks"], len(found["sites"])) == (3, 22)
    assert found["sites"][0].keys() == {"name", "shape", "kind", "stored_as", "std", "largest"}
    words = pennyweight("inspect", model).stdout
    assert "LlamaForCausalLM, 3 blocks" in words
    assert "model.layers.*.self_attn.q_proj" in words
    assert "the output head, lm_head, stays in float too unless" in words
    assert "kernels" in _json(pennyweight("inspect", "--cpu", "--json"))


def test_verify_prints_one_json_object_or_fails_loudly(pennyweight: Command, artefact: Path, tmp_path: Path) -> None:
    found = _json(pennyweight("verify", artefact, "--extent", "blocks", "--json"))
    assert (found["verified"], found["weights_compared"]) == ("partial", 21)
    mine = Path(shutil.copytree(artefact, tmp_path / "mine"))
    raw = bytearray((mine / "model.safetensors").read_bytes())
    raw[-3] ^= 1
    (mine / "model.safetensors").write_bytes(raw)
    result = pennyweight("verify", mine, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {mine}: model.safetensors is not the file that was written")


def test_run_continues_a_prompt(pennyweight: Command, artefact: Path) -> None:
    found = _json(pennyweight("run", artefact, "--prompt", "a bee", "--max-tokens", 5, "--device", "cpu", "--json"))
    assert found["prompt"] == "a bee"
    assert 1 <= found["tokens"] <= 5
    same = _json(pennyweight("run", artefact, "--prompt", "a bee", "--max-tokens", 5, "--device", "cpu", "--json"))
    assert same["text"] == found["text"]


def test_convert_prints_one_json_object_and_says_what_became_of_the_codes(
    pennyweight: Command, artefact: Path, tmp_path: Path
) -> None:
    asked = ("--for", "vllm", "--verify", "none")
    found = _json(pennyweight("convert", artefact, "--out", tmp_path / "out", *asked[:1], "transformers", "--json"))
    promised = {"out", "size_bytes", "bpw", "sites", "kept", "changed", "seconds", "peak_memory_bytes", "verified"}
    assert promised <= found.keys()
    assert (found["sites"], found["verified"], found["kept"], found["changed"]) == (21, "full", {}, {})
    words = pennyweight("convert", artefact, "--out", tmp_path / "vllm", *asked)
    assert words.exit_code == 1
    assert "groups of 16 given; vLLM's Marlin kernels take groups of 32, 64 or 128" in words.stderr
    words = pennyweight("convert", artefact, "--out", tmp_path / "words", "--for", "transformers", "--verify", "none")
    assert "21 weights with their codes, at 6.000 bits, scales included" in words.stdout
    assert "verified: none" in words.stdout


def test_run_needs_llama_cpp_for_gguf(
    pennyweight: Command, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Path(shutil.copytree(artefact, tmp_path / "mine"))
    (mine / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    result = pennyweight("run", mine, "--prompt", "a bee")
    assert result.exit_code == 1
    assert result.stderr == "error: llama_cpp is needed here: pip install 'pennyweight[llama-cpp]'\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("quantize", "nowhere/at/all", "--out", "out"), 1, "there is no such path"),
        (("quantize", "MODEL", "--out", "out", "--scheme", "int4"), 2, "'int4' is not the name of a scheme"),
        (("quantize", "MODEL", "--out", "out", "--scheme", "int4-g16", "--bits", "4"), 2, "give one of"),
        (("quantize", "MODEL", "--out", "out", "--bits", "9"), 2, "--bits"),
        (("quantize", "MODEL", "--out", "out", "--solver", "magic"), 2, "choose|gptq, gptq-refined"),
        (("quantize", "MODEL", "--out", "out", "--fit", "best"), 2, "--fit best"),
        (("quantize", "MODEL", "--out", "out", "--verify", "maybe"), 2, "--verify maybe"),
        (("quantize", "MODEL", "--out", "out", "--for", "abacus"), 2, "choose from llama.cpp, transformers, vllm"),
        (("quantize", "MODEL", "--out", "out", "--device", "abacus"), 2, "--device abacus: not a device"),
        (("quantize", "MODEL", "--out", "out", "--device", "meta"), 2, "--device meta: not a device"),
        (("quantize", "MODEL", "--out", "out", "--device", "cuda:99"), 2, "no such GPU"),
        (("quantize", "MODEL", "--out", "x", "--solver", "gptq", "--calibration", "none"), 2, "needs calibration data"),
        (("quantize", "MODEL", "--out", "out", "--calibration", "no.txt"), 1, "no.txt does not exist"),
        (("quantize", "MODEL", "--out", "MODEL"), 2, "is not an empty directory"),
        (("quantize", "MODEL", "--out", "far/away"), 2, "far does not exist"),
        (("quantize", "MODEL", "--out", "out", "--for", "vllm", "--bits", 3, "--solver", "nearest"), 1, "4 and 8 bits"),
        (("quantize", "MODEL"), 2, "--out"),
        (("quantize", "MODEL", "--out", "out", "--size", "4 apples"), 2, "4GB"),
        (("quantize", "MODEL", "--out", "out", "--size", "4GB", "--bits", "4"), 2, "give one of"),
        (("quantize", "MODEL", "--out", "out", "--size", "1KB", "--length", "24"), 2, "the smallest plan takes"),
        (("quantize", "MODEL", "--out", "out", "--plan", "no.json"), 2, "no.json: there is no such file, and"),
        (("quantize", "MODEL", "--out", "out", "--keep", "*.nothing"), 2, "--keep *.nothing: no site"),
        (("quantize", "MODEL", "--out", "out", "--at", "*.q_proj"), 2, "GLOB=SCHEME"),
        (("quantize", "MODEL", "--out", "out", "--max-kl", "0.1", "--length", 24, "--samples", 99999), 1, "calibrat"),
        (("plan", "MODEL", "--size", "4GB", "--bpw", "3"), 2, "--size and --bpw exclude"),
        (("plan", "MODEL", "--out", "MODEL", "--bpw", "12"), 2, "is not an empty directory"),
        (("plan", "nowhere/at/all"), 1, "there is no such path"),
        (("evaluate", "MODEL", "--against", "MODEL", "--text", "no.txt"), 1, "no.txt does not exist"),
        (("inspect",), 2, "name a model"),
        (("inspect", "nowhere/at/all"), 1, "there is no such path"),
        (("verify", "nowhere/at/all"), 1, "does not exist"),
        (("verify", "MODEL", "--extent", "some"), 2, "--extent some"),
        (("convert", "MODEL", "--out", "out"), 2, "--for"),
        (("convert", "MODEL", "--out", "out", "--for", "abacus"), 2, "choose from"),
        (("convert", "MODEL", "--out", "out", "--for", "vllm"), 1, "no codes that could be copied"),
        (("convert", "MODEL", "--out", "MODEL", "--for", "vllm"), 2, "is not an empty directory"),
        (("convert", "MODEL", "--out", "out", "--for", "vllm", "--verify", "maybe"), 2, "--verify maybe"),
        (("convert", "nowhere/at/all", "--out", "out", "--for", "vllm"), 1, "there is no such path"),
        (("run", "MODEL"), 2, "--prompt"),
        (("run", "nowhere/at/all", "--prompt", "a"), 1, "there is no such path"),
        (("demo", "--out", "MODEL"), 2, "exists"),
        (("quantise",), 2, "quantise"),
    ],
)  # fmt: skip
def test_every_wrong_use_ends_with_the_right_code_and_leaves_nothing(
    pennyweight: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = pennyweight(*(str(model) if argument == "MODEL" else argument for argument in arguments))
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert any(part in result.stderr for part in message.split("|"))
    assert "Traceback" not in result.stderr
    if result.stderr.startswith("error"):
        assert result.stderr.count("\n") == 1
    assert tiny.traces(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "\ninterrupted"),
        (OSError(5, "Input/output error", "/dev/disk"), "error: /dev/disk: Input/output error"),
    ],
)
def test_an_ended_run_says_what_is_kept(
    pennyweight: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    error.add_note("2 finished blocks are kept in x")

    def fail(*args: object, **kwargs: object) -> RunReport:
        raise error

    monkeypatch.setattr("pennyweight.evaluate.proved.quantize", fail)
    result = pennyweight("quantize", "model", "--out", "out")
    assert (result.exit_code, result.stderr) == (1, f"{said}; 2 finished blocks are kept in x\n")


def test_a_fault_of_ours_is_not_dressed_up(pennyweight: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> RunReport:
        raise ZeroDivisionError

    monkeypatch.setattr("pennyweight.evaluate.proved.quantize", fail)
    assert isinstance(pennyweight("quantize", "model", "--out", "out").exception, ZeroDivisionError)


def test_numbers_that_json_lacks_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    console.put_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": (1,)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [1]}


def test_the_bar_is_drawn_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.Bar("blocks").show(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = console.Bar("blocks")
    bar.show(1, 2)
    bar.show(2, 2)
    drawn = capsys.readouterr().err
    assert "blocks [###############...............] 1/2" in drawn
    assert "left" in drawn
    assert drawn.endswith("\n")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console.device_of("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert console.device_of("auto") == "cuda"
    assert console.device_of("cuda:1") == "cuda:1"
    with pytest.raises(UsageError, match="no such GPU"):
        console.device_of("cuda:2")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_described_in_a_line_that_fits(pennyweight: Command, name: str) -> None:
    assert pennyweight(name, "--help").exit_code == 0
    [line] = [line for line in pennyweight("--help").stdout.splitlines() if line.startswith(f"  {name} ")]
    assert not line.endswith("...")
