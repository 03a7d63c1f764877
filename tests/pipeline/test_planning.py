"""Plans under a budget, from the model to the bytes on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pennyweight.core.errors import BudgetError, ContainerError, UsageError
from pennyweight.core.registry import find
from pennyweight.pipeline import measuring
from pennyweight.pipeline.beside import output_bytes
from pennyweight.pipeline.costs.base import DEFAULT_COST
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.measuring import Measuring
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.planning import Problem, problem_of, within
from pennyweight.pipeline.prepare import drafted
from pennyweight.plan.budget import Budget
from pennyweight.plan.candidates import Candidates
from pennyweight.plan.plan_file import PlanEntries, read_plan_file
from pennyweight.schemes import parse_scheme
from tests.pipeline import tiny

BLIND = replace(tiny.OPTIONS, solver="nearest", calibration="none")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("planned") / "llama", hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.mixtral(tmp_path_factory.mktemp("planned") / "mixtral")


def _by_bits(groups: Sequence[Candidates]) -> list[list[float]]:
    """Costs without a model: four times as much with every bit fewer, and more for later groups."""
    return [
        [0.0 if scheme is None else (place + 1) * 4.0**-scheme.element.bits for scheme in group.schemes]
        for place, group in enumerate(groups)
    ]


def _problem(model: Path, options: Options = BLIND) -> Problem:
    return problem_of(drafted(str(model), options, None), _by_bits)


def _tensor_bytes(out: Path) -> int:
    total = 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return total


def _all_bytes(out: Path) -> int:
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_tensors_come_within_a_hundredth_of_the_bits_that_were_asked(name: str, request: pytest.FixtureRequest) -> None:
    draft = drafted(str(request.getfixturevalue(name)), BLIND, None)
    problem = problem_of(draft, _by_bits)
    smallest = 8 * problem.frontier.points[0].size_bytes / problem.weights
    widest = max(8 * size / problem.weights for scheme, size, _ in problem.uniform if scheme.startswith("int8"))
    for step in range(10):
        bpw = smallest + step / 9 * (widest - smallest)
        plan = within(draft, problem, Budget("bpw", bpw))
        asked = int(bpw * problem.weights / 8)
        found, _ = problem.of(plan)
        assert 0.99 * asked <= found <= asked, (step, bpw)
        assert sum(info.size_bytes for info in draft.job(plan).entries.values()) == found


@pytest.mark.promise
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_whole_output_is_never_larger_than_was_asked(llama: Path, tmp_path: Path, share: float) -> None:
    smallest = tiny.run(llama, tmp_path / "smallest", replace(BLIND, budget=Budget("bpw", _least_bpw(llama))))
    size = int(smallest.size_bytes * (1.2 + share))
    report = tiny.run(llama, tmp_path / "out", replace(tiny.OPTIONS, budget=Budget("size", size)))
    assert report.budget_bytes == size
    assert report.size_bytes == _all_bytes(tmp_path / "out") <= size
    assert report.size_bytes > 0.8 * size


def _least_bpw(model: Path) -> float:
    problem = _problem(model)
    return 8 * problem.frontier.points[0].size_bytes / problem.weights + 1e-6


def test_a_size_below_the_smallest_plan_says_what_that_is_and_what_would_help(llama: Path) -> None:
    draft = drafted(str(llama), replace(BLIND, keep=("*.down_proj",)), None)
    problem = problem_of(draft, _by_bits)
    with pytest.raises(BudgetError, match=r"1,000 bytes can't be reached.*% of it are embeddings.*3 sites are kept"):
        within(draft, problem, Budget("size", 1000))
    least = problem.frontier.points[0].size_bytes
    with pytest.raises(BudgetError, match=f"the smallest plan takes {least:,} bytes"):
        within(draft, problem, Budget("bpw", 0.1))


@pytest.mark.parametrize("asked", [1, 130_000])
def test_the_smallest_size_that_is_named_is_the_smallest_that_can_be_had(llama: Path, asked: int) -> None:
    def drafted_for(size: int) -> Draft:
        return drafted(str(llama), replace(BLIND, budget=Budget("size", size)), None)

    draft = drafted_for(asked)
    problem = problem_of(draft, _by_bits)
    with pytest.raises(BudgetError) as caught:
        within(draft, problem, Budget("size", asked))
    least = caught.value.smallest
    plan = within(drafted_for(least), problem, Budget("size", least))
    assert problem.of(plan)[0] == problem.frontier.points[0].size_bytes
    with pytest.raises(BudgetError):
        within(drafted_for(least - 1), problem, Budget("size", least - 1))


def test_every_size_that_can_be_had_is_met(llama: Path) -> None:
    one = Budget("size", 1)
    draft, problem = drafted(str(llama), replace(BLIND, budget=one), None), _problem(llama)
    with pytest.raises(BudgetError) as caught:
        within(draft, problem, one)
    for size in range(caught.value.smallest, caught.value.smallest * 5 // 4, 487):
        budget = Budget("size", size)
        sized = replace(draft, options=replace(BLIND, budget=budget))
        assert output_bytes(sized.job(within(sized, problem, budget))) <= size


def test_the_default_cost_is_measured_once_and_kept_for_other_budgets(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(tiny.OPTIONS, seed=5)
    first = problem_of(draft := drafted(str(llama), options, None), Measuring(draft))
    costs = [choice.cost for group in first.groups for choice in group.choices]
    assert len(set(costs)) > len(first.groups)
    # Of one site fewer bits cost more, about four times a bit.
    one = {str(choice.scheme): choice.cost for choice in first.groups[0].choices}
    assert one["int2-g64-f32"] > 2 * one["int3-g64-f32"] > 4 * one["int4-g64-f32"] > 0 == one["None"]

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(type(find("pipeline.costs", DEFAULT_COST)), "measure", never)
    again = problem_of(draft := drafted(str(llama), options, None), Measuring(draft))
    assert again.groups == first.groups


@pytest.mark.parametrize(
    ("options", "solver"),
    [
        (replace(tiny.OPTIONS, solver=None, effort="fast"), "gptq"),
        (replace(tiny.OPTIONS, solver=None, effort="normal"), "gptq"),
        (replace(tiny.OPTIONS, solver="nearest"), "nearest"),
        (BLIND, "nearest"),
    ],
)
def test_costs_are_those_of_a_rounding_like_the_runs(
    options: Options, solver: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def costs(*args: Any, **named: Any) -> list[list[float]]:
        asked.append(named["solver"].name)
        return [[0.0 for _ in group.schemes] for group in args[3]]

    monkeypatch.setattr(measuring, "cached_costs", costs)
    problem_of(draft := drafted(str(llama), options, None), Measuring(draft))
    assert asked == [solver]


def test_vllm_gets_one_scheme_for_what_it_merges(tmp_path: Path) -> None:
    model = tiny.llama(
        tmp_path / "wide", hidden_size=128, intermediate_size=128, num_hidden_layers=2, dtype=torch.bfloat16
    )
    draft = drafted(str(model), replace(BLIND, runtime="vllm"), None)
    problem = problem_of(draft, _by_bits)
    merged = [group.sites for group in problem.groups if len(group.sites) > 1]
    assert [tuple(site.rsplit(".", 1)[1] for site in sites) for sites in merged] == [
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    ] * 2
    for point in problem.frontier.points[:-1]:
        plan = problem.plan(problem.frontier.schemes(point))
        assert draft.refusal(plan) is None
        assert {scheme.element.bits for scheme in plan.schemes.values()} <= {4, 8}


def test_transformers_gets_one_scheme_for_all_experts_and_never_some_in_float(mixtral: Path) -> None:
    draft = drafted(str(mixtral), BLIND, None)
    problem = problem_of(draft, _by_bits)
    [experts] = [group for group in problem.groups if len(group.sites) > 1]
    assert len(experts.sites) == sum(site.kind == "expert" for site in draft.model.sites)
    assert all(choice.scheme is not None for choice in experts.choices)
    for point in problem.frontier.points:
        assert draft.refusal(problem.plan(problem.frontier.schemes(point))) is None


def test_an_untied_head_is_a_candidate_with_four_bits_or_more(llama: Path) -> None:
    [head] = [group for group in _problem(llama).groups if group.sites == ("lm_head",)]
    assert min(choice.scheme.element.bits for choice in head.choices if choice.scheme) == 4
    assert head.choices[-1].scheme is None


def test_what_the_user_decided_is_what_the_run_writes(llama: Path, tmp_path: Path) -> None:
    options = replace(BLIND, scheme="int3-g16", keep=("*.o_proj",), at=("*.down_proj=int8-channel", "lm_head=int8-g32"))
    tiny.run(llama, tmp_path / "out", options)
    record = json.loads((tmp_path / "out" / "pennyweight.json").read_text())
    schemes, kept = record["plan"]["schemes"], record["plan"]["kept"]
    assert {name: scheme for name, scheme in schemes.items() if ".0." in name or name == "lm_head"} == {
        **{f"model.layers.0.self_attn.{leaf}_proj": "int3-g16-f32" for leaf in "qkv"},
        **{f"model.layers.0.mlp.{leaf}_proj": "int3-g16-f32" for leaf in ("gate", "up")},
        "model.layers.0.mlp.down_proj": "int8-channel-f32",
        "lm_head": "int8-g32-f32",
    }
    assert set(kept) == {f"model.layers.{block}.self_attn.o_proj" for block in range(3)}
    assert set(kept.values()) == {"--keep *.o_proj"}
    # The same plan given as such is the same artefact, but for the recipe.
    entries = {name: schemes.get(name, "keep") for name in [*schemes, *kept]}
    tiny.run(llama, tmp_path / "again", replace(BLIND, plan=PlanEntries("mine", entries)))
    ours, theirs = (tiny.digests(tmp_path / name) for name in ("out", "again"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["config.json"] == theirs["config.json"]


def test_a_scheme_that_does_not_fit_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ContainerError, match=r"--at \*\.q_proj=int4-g48: model\.layers\.0.* groups of 48 do not divide"
    ):
        tiny.run(llama, tmp_path / "out", replace(BLIND, at=("*.q_proj=int4-g48",)))
    with pytest.raises(UsageError, match="exclude each other"):
        replace(BLIND, budget=Budget("bpw", 4.0), plan=PlanEntries("mine", {})).check()
    with pytest.raises(UsageError, match="edit it in place of --keep"):
        replace(BLIND, plan=PlanEntries("mine", {}), keep=("*",)).check()
    assert tiny.traces(tmp_path) == []


def test_a_plan_and_its_budget_are_in_the_recipe_and_resume_by_it(llama: Path, tmp_path: Path) -> None:
    options = replace(tiny.OPTIONS, budget=Budget("bpw", 12.0))
    tiny.run(llama, tmp_path / "out", options)
    recipe = json.loads((tmp_path / "out" / "pennyweight.json").read_text())["recipe"]
    assert recipe["budget"] == "--bpw 12"
    assert set(recipe["plan"]) >= {site.name for site in drafted(str(llama), BLIND, None).model.sites}
    tiny.run(llama, tmp_path / "again", options)
    assert tiny.digests(tmp_path / "out") == tiny.digests(tmp_path / "again")


def test_a_written_plan_file_gives_the_run_that_the_budget_gives(llama: Path, tmp_path: Path) -> None:
    from pennyweight.evaluate.planned import planned
    from pennyweight.report.plan_directory import write_plan

    options = replace(tiny.OPTIONS, budget=Budget("bpw", 12.0))
    found = planned(str(llama), options)
    names = write_plan(tmp_path / "plan", found)
    assert names == ["plan.json", "frontier.json", "frontier.svg"]
    assert "one scheme everywhere" in (tmp_path / "plan" / "frontier.svg").read_text()
    tiny.run(llama, tmp_path / "out", options)
    entries = read_plan_file(tmp_path / "plan" / "plan.json")
    tiny.run(llama, tmp_path / "given", replace(options, budget=None, plan=entries))
    ours, theirs = (tiny.digests(tmp_path / name) for name in ("out", "given"))
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert parse_scheme(next(iter(entries.entries.values()))).element.bits >= 2
