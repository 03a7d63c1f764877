"""The directory of a quantized network: whole, verified, and checked again without the network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pennyweight as pw
from pennyweight.cli.main import app
from pennyweight.core.errors import CheckpointError, ModelError, UsageError, VerificationError
from pennyweight.evaluate.network import artefact, check
from pennyweight.evaluate.network.artefact import Writing, write_artefact
from pennyweight.evaluate.network.directory import appearing, read_check, write_check
from pennyweight.evaluate.network.inventory import network_inventory
from pennyweight.evaluate.onnx.latency import Latency
from pennyweight.models.network.network import Inputs
from tests.evaluate.network.networks import draft_of, mlp, nearest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    quantized = nearest(*mlp(), "int4-g32")
    target = tmp_path_factory.mktemp("artefact") / "out"
    writing = Writing("onnxruntime", "full", quantized.network, seconds=0.05)
    write_artefact(quantized, target, draft_of(quantized), [Inputs.of(torch.randn(3, 64))], writing)
    return target


def copied(directory: Path, tmp_path: Path) -> Path:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_all_files_are_there_and_nothing_beside(directory: Path) -> None:
    names = {file.name for file in directory.iterdir()}
    assert names == {"model.onnx", "check.safetensors", "pennyweight.json", "run.json", "README.md"}
    assert [file.name for file in directory.parent.iterdir()] == ["out"]


def test_the_record_says_what_was_written(directory: Path) -> None:
    record = json.loads((directory / "pennyweight.json").read_text())
    assert record["verified"] == "full"
    assert record["sizes"]["file_bytes"] == (directory / "model.onnx").stat().st_size
    # Four bits, and a float32 scale for 32 of them; the last layer's 10 rows alike.
    assert record["sizes"]["bpw_sites"] == 5.0
    assert [site["form"] for site in record["sites"]] == ["blocks"] * 3
    assert sum(site["size_bytes"] for site in record["sites"]) == record["sizes"]["site_bytes"]
    assert record["verification"][0]["samples"] == 4 + 3
    assert "latency" not in record
    assert json.loads((directory / "run.json").read_text())["latency"][0]["runs"] >= 5
    card = (directory / "README.md").read_text()
    assert "`int4-g32-f32`" in card
    assert "| input | float32 | any x 64 |" in card


def test_it_is_verified_again_in_a_fresh_process(directory: Path) -> None:
    found = pw.verify(directory)
    assert found["verified"] == "full"
    assert found["runtimes"][0]["outputs"][0]["relative_error"] > 0


def test_a_changed_file_is_found(directory: Path, tmp_path: Path) -> None:
    place = copied(directory, tmp_path)
    data = bytearray((place / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "model.onnx").write_bytes(data)
    with pytest.raises(VerificationError, match="model.onnx is not the file that was written"):
        pw.verify(place)


def test_codes_that_are_others_are_found_without_hashes(directory: Path, tmp_path: Path) -> None:
    place = copied(directory, tmp_path)
    inputs, outputs, allowed = read_check(place / "check.safetensors")
    write_check(place / "check.safetensors", inputs, [outputs[0] * 1.1], allowed)
    assert "computes something else" in check.findings(place)["problems"][0]


def test_damaged_sidecars_are_named(directory: Path, tmp_path: Path) -> None:
    place = copied(directory, tmp_path)
    (place / "check.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="check.safetensors cannot be read"):
        check.findings(place)
    (place / "pennyweight.json").write_text("{}")
    with pytest.raises(ModelError, match="pennyweight.json is damaged"):
        check.findings(place)
    (place / "pennyweight.json").unlink()
    with pytest.raises(ModelError, match="has no pennyweight.json"):
        check.findings(place)


def test_what_does_not_verify_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = nearest(*mlp(), "int4-g32")
    weight = quantized.weights["2"]
    other = replace(quantized, weights={**quantized.weights, "2": replace(weight, codes=15 - weight.codes)})
    real = artefact.write_onnx
    monkeypatch.setattr(artefact, "write_onnx", lambda _, path, **options: real(other, path, **options))
    writing = Writing("onnxruntime", "full", quantized.network)
    with pytest.raises(VerificationError, match="linear_2 is .* off"):
        write_artefact(quantized, tmp_path / "out", draft_of(quantized), [], writing)
    assert list(tmp_path.iterdir()) == []


def test_unverified_artefacts_say_so(tmp_path: Path) -> None:
    quantized = nearest(*mlp(), "int8-channel")
    record = write_artefact(
        quantized, tmp_path / "out", draft_of(quantized), [], Writing("onnxruntime", "none", quantized.network)
    )
    assert record.verified == "none"
    assert "Not verified" in (tmp_path / "out" / "README.md").read_text()
    assert pw.verify(tmp_path / "out")["verified"] == "full"


def test_a_directory_that_comes_to_exist_is_left_alone(tmp_path: Path) -> None:
    def run() -> None:
        with appearing(tmp_path / "out") as work:
            (work / "mine").write_text("")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("")

    with pytest.raises(UsageError, match="came to exist"):
        run()
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "theirs"]


def test_the_same_run_writes_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = nearest(*mlp(), "int4-g32")
    writing = Writing("onnxruntime", "full", quantized.network, seconds=0.05)
    write_artefact(quantized, tmp_path / "out", draft_of(quantized), [Inputs.of(torch.randn(3, 64))], writing)
    for name in ("model.onnx", "check.safetensors", "pennyweight.json"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes(), name


def test_a_slower_file_is_warned_of() -> None:
    quantized = nearest(*mlp(), "int8-channel")
    record = replace(draft_of(quantized), latency=(Latency("onnxruntime 1", 1.0, 2.0, 9, 0, 1),))
    (warning,) = record.warnings
    assert "2.00 times as long" in warning
    shown: dict[str, Any] = record.measured()
    assert shown["warnings"] == [warning]
    assert warning in artefact.network_card(replace(record, sizes={"file_bytes": 1}))


def test_what_is_in_it_can_be_listed(directory: Path, tmp_path: Path) -> None:
    found = network_inventory(directory)
    assert found.weights == 64 * 96 * 2 + 64 * 10
    assert found.size_bytes == (directory / "model.onnx").stat().st_size
    with pytest.raises(ModelError, match="pennyweight.json is missing or damaged"):
        network_inventory(tmp_path)


def test_the_commands_take_the_directory(directory: Path) -> None:
    runner = CliRunner()
    words = runner.invoke(app, ["inspect", str(directory)])
    assert words.exit_code == 0, words.output
    assert "Sequential for onnxruntime, 12,928 quantized weights" in words.stdout
    assert "int4-g32-f32" in words.stdout
    as_json = runner.invoke(app, ["inspect", str(directory), "--json"])
    assert json.loads(as_json.stdout)["verified"] == "full"
    verified = runner.invoke(app, ["verify", str(directory)])
    assert verified.exit_code == 0, verified.output
    assert "verified: full" in verified.stdout
