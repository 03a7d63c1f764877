"""The search for the smallest plan that holds, and what a trial is judged by."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pennyweight.core.errors import DataError, ModelError
from pennyweight.evaluate import loss_budget
from pennyweight.evaluate.compare import WindowScores
from pennyweight.evaluate.confidence import paired_bound
from pennyweight.evaluate.judges import TaskJudge, bounded
from pennyweight.evaluate.loss_budget import Trial
from pennyweight.evaluate.loss_search import Search
from pennyweight.evaluate.proved import quantize
from pennyweight.evaluate.tasks.evaluated import evaluate_task
from pennyweight.evaluate.tasks.exam import Exam
from pennyweight.evaluate.trials import Measured
from pennyweight.plan.budget import Budget
from pennyweight.plan.frontier import Point
from tests.evaluate.tasks import examples
from tests.pipeline import tiny


def _searched(points: list[Point], true: list[float], limit: float, scale: float = 1.0) -> tuple[int | None, int]:
    """What the search takes where the plan `index` loses true[index], and how many trials that takes."""
    search: Search[Trial] = Search(points, limit, scale=scale)
    while (index := search.next()) is not None:
        assert index not in search.tried
        loss = true[index]
        search.add(index, Trial(points[index].size_bytes, points[index].cost, loss, loss, loss <= limit))
    return search.best, len(search.tried)


@given(
    count=st.integers(2, 200),
    factor=st.floats(0.05, 20),
    bend=st.floats(0.5, 2),
    place=st.floats(-0.1, 1.2),
)
def test_the_smallest_plan_that_holds_is_found_to_a_hundredth(
    count: int, factor: float, bend: float, place: float
) -> None:
    points = [Point(int(10**6 * 1.01**index), 2.0 * 0.93**index, ()) for index in range(count)]
    true = [factor * point.cost**bend for point in points]
    limit = true[0] * (true[-1] / true[0]) ** place if place < 1 else true[-1] / 2
    first = next((index for index, loss in enumerate(true) if loss <= limit), None)
    found, trials = _searched(points, true, limit)
    assert trials <= 12
    if first is None:
        assert found is None
        return
    assert found is not None
    assert true[found] <= limit
    assert points[found].size_bytes <= 1.0101 * points[first].size_bytes


@settings(deadline=None, max_examples=60)
@given(items=st.integers(300, 5000), share=st.floats(0.01, 0.5), limit=st.floats(0.5, 5), seed=st.integers(0, 99))
def test_of_a_task_too_a_plan_is_found_that_holds_beside_one_that_does_not(
    items: int, share: float, limit: float, seed: int
) -> None:
    """Accuracies: answers change with the root of the KL, most of them for nothing, and trials are noisy."""
    points = [Point(int(10**6 * 1.01**index), 0.3 * 0.95**index, ()) for index in range(150)]
    chosen = random.Random(seed)

    def upper(cost: float) -> float:
        differing = min(1.0, math.sqrt(cost)) * items
        worse, better = (max(0, round(differing * part + chosen.gauss(0, 0.1 * differing**0.5)))
                         for part in ((1 + share) / 2, (1 - share) / 2))  # fmt: skip
        return 100 * paired_bound(worse, better, items)

    true = [upper(point.cost) for point in points]
    found, trials = _searched(points, true, limit, scale=100)
    assert trials <= 12
    if found is None:
        assert true[-1] > limit
        return
    assert true[found] <= limit
    # Points are a hundredth apart, and two of them are near enough.
    assert found <= 1 or max(true[found - 2 : found]) > limit or trials == 12


def test_predictions_that_are_right_need_few_trials() -> None:
    points = [Point(int(10**6 * 1.01**index), 0.5 * 0.95**index, ()) for index in range(150)]
    _, trials = _searched(points, [0.4 * point.cost for point in points], 0.01)
    assert trials <= 4


def _scores(kl: list[float], more: list[float]) -> list[WindowScores]:
    return [
        WindowScores(tokens=10, nats=10 * (3 + extra), reference_nats=30.0, kl=10 * divergence)
        for divergence, extra in zip(kl, more, strict=True)
    ]


def test_a_loss_is_the_mean_and_its_bound_is_above_it_by_the_standard_errors() -> None:
    scores = _scores([0.01, 0.03], [0.02, 0.04])
    mean, upper = bounded(scores, Budget("max-kl", 0.1))
    assert mean == pytest.approx(0.02)
    assert upper == pytest.approx(0.02 + 2.33 * 0.01)
    mean, upper = bounded(scores, Budget("max-loss", 0.1))
    assert mean == pytest.approx(math.expm1(0.03))
    assert upper == pytest.approx(math.expm1(0.03 + 2.33 * 0.01))


# -- judged on a task, from end to end ------------------------------------------------------------------------------


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """One that nothing is kept beside."""
    return shutil.copytree(original, tmp_path / "model", ignore=shutil.ignore_patterns(".pennyweight"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = examples.continuations(tiny.words(3000, seed=4).split(), 300, length=4)
    return examples.write(tmp_path_factory.mktemp("task") / "choices.jsonl", items)


ASKED: dict[str, Any] = dict(calibration=(tiny.words(),), samples=12, length=24, effort="fast", verification="none")


def test_a_budget_of_points_is_kept_and_its_evidence_recorded(model: Path, task: Path, tmp_path: Path) -> None:
    heard: list[Trial] = []
    quantize(model, tmp_path / "out", max_loss="5", task=task, **ASKED, tell_trial=heard.append)
    evidence = json.loads((tmp_path / "out" / "pennyweight.json").read_text())["found"]["budget"]
    assert {name: evidence[name] for name in ("budget", "confidence", "task", "kind", "items")} == {
        "budget": "--max-loss 5 --task choices.jsonl", "confidence": 0.95, "task": "choices.jsonl",
        "kind": "multiple-choice", "items": 300,
    }  # fmt: skip
    assert evidence["trials"] == [trial.evidence for trial in heard]
    assert any(trial.holds for trial in heard)
    for trial in heard:
        assert trial.original is not None
        assert trial.metric is not None
        assert trial.loss == pytest.approx(trial.original - trial.metric)
        assert trial.holds == (trial.upper <= 5)
    best = min((trial for trial in heard if trial.holds), key=lambda trial: trial.size_bytes)
    found = evaluate_task(str(tmp_path / "out"), against=str(model), path=task)
    assert (found.lost, found.upper) == (best.loss, best.upper)
    assert found.metrics["accuracy"] == best.metric
    assert found.reference["accuracy"] == best.original
    assert found.sizes.bpw < 32
    # What was written is no larger than what was tried.
    assert best.size_bytes == pytest.approx(
        found.sizes.bpw / found.sizes.reference_bpw * _tensor_bytes(model), rel=1e-3
    )


def _tensor_bytes(model: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())


class _Killed(BaseException):
    pass


def test_a_run_that_was_killed_repeats_no_trial_that_was_finished(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = loss_budget._Trials._measured

    def measured(self: Any, point: Point) -> Any:
        if len(made) == 2:
            raise _Killed
        found = real(self, point)
        made.append(point)
        return found

    monkeypatch.setattr(loss_budget._Trials, "_measured", measured)
    limit = dict(max_kl=0.001, **ASKED)
    with pytest.raises(_Killed):
        quantize(model, tmp_path / "out", **limit)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    monkeypatch.setattr(loss_budget._Trials, "_measured", lambda self, point: made.append(point) or real(self, point))
    heard: list[Trial] = []
    quantize(model, tmp_path / "out", **limit, tell_trial=heard.append)
    assert [trial.resumed for trial in heard] == [True, True] + [False] * (len(heard) - 2)
    assert len(heard) == len(made) == len(set(made)) > 2
    # Again, all of them are known; the output is that of a run without any of this.
    quantize(model, tmp_path / "again", **limit)
    assert len(made) == len(heard)
    shutil.rmtree(model / ".pennyweight")
    quantize(model, tmp_path / "whole", **limit)
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "again") == tiny.digests(tmp_path / "whole")


def test_another_limit_asks_no_model_what_is_known(
    model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(model, tmp_path / "one", max_loss=20, task=task, **ASKED)
    monkeypatch.setattr(Exam, "outcomes", None)
    heard: list[Trial] = []
    quantize(model, tmp_path / "two", max_loss=19, task=task, **ASKED, tell_trial=heard.append)
    assert [trial.resumed for trial in heard] == [True]
    one, two = (json.loads((tmp_path / name / "pennyweight.json").read_text())["found"] for name in ("one", "two"))
    assert one["budget"]["trials"] == two["budget"]["trials"]


@pytest.mark.parametrize("change", ["task", "calibration", "damage"])
def test_trials_of_something_else_are_made_again(model: Path, task: Path, tmp_path: Path, change: str) -> None:
    limit: dict[str, Any] = dict(max_loss=20, **ASKED)
    quantize(model, tmp_path / "one", task=task, **limit)
    mine = tmp_path / "mine.jsonl"
    lines = task.read_text().splitlines(keepends=True)
    mine.write_text("".join(lines[1:] if change == "task" else lines))
    if change == "calibration":
        limit["calibration"] = (tiny.words(seed=8),)
    [kept] = (model / ".pennyweight").glob("trials-*.json")
    if change == "damage":
        kept.write_text(kept.read_text().replace('"upper": ', '"upper": NaN, "was": '))
    heard: list[Trial] = []
    quantize(model, tmp_path / "two", task=mine, **limit, tell_trial=heard.append)
    assert not any(trial.resumed for trial in heard)


def test_an_encoder_gets_a_budget_of_loss(tmp_path: Path) -> None:
    model, words = examples.bert(tmp_path / "bert"), tiny.words().split()
    task = examples.write(tmp_path / "pairs.jsonl", examples.pairs(words, 60))
    quantize(model, tmp_path / "out", max_loss="6", task=task, **ASKED)
    found = evaluate_task(str(tmp_path / "out"), against=str(model), path=task)
    assert found.kind == "sentence-pairs"
    assert found.upper <= 6
    assert found.sizes.bpw < found.sizes.reference_bpw
    with pytest.raises(ModelError, match="--max-kl 0.1: BertModel predicts no tokens.*--task of sentence pairs"):
        quantize(model, tmp_path / "no", max_kl=0.1, **ASKED)


def test_too_few_items_for_the_limit_are_refused_before_anything_is_measured(
    model: Path, task: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="300 items cannot show so little.*give 1,081 or more") as error:
        quantize(model, tmp_path / "out", max_loss=0.5, task=task, **ASKED)
    assert str(error.value).startswith("--max-loss 0.5 --task choices.jsonl: ")
    assert not (model / ".pennyweight").exists()


def test_a_limit_that_no_plan_meets_says_how_many_items_would_do() -> None:
    judge = TaskJudge(None, SimpleNamespace(task=SimpleNamespace(items=range(400))))  # type: ignore[arg-type]
    # Of four times as many items the bound is half as far away.
    assert judge.more(Measured(loss=1.0, upper=2.0), 1.5) == "more items, about 1,600"
    assert judge.more(Measured(loss=2.0, upper=3.0), 1.5) == "more items"
