"""What every cost that is provided must do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.core.errors import UsageError, WeightError
from pennyweight.core.registry import provided
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.costs.base import DEFAULT_COST, Cost
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import Scheme, parse_scheme
from pennyweight.solvers.base import Solver
from pennyweight.solvers.gptq import Gptq
from pennyweight.solvers.nearest import Nearest
from tests.models.families import FAMILIES, build, save, token_batches

COSTS = list(provided("pipeline.costs").values())
# Sums of float32 through two blocks, in other orders, and divergences made of small differences of them.
CLOSE = 1e-3
SCHEMES = tuple(parse_scheme(f"{name}-f32") for name in ("int2-g8", "int4-g8", "int8-g8"))
NEAREST = Nearest()
BATCHES = token_batches((4, 3))
every_cost = pytest.mark.parametrize("cost", COSTS, ids=lambda found: str(found.name))
# Decoder, encoder, and one whose matrices are stored the other way round.
every_family = pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StreamedModel]:
    names = ("llama", "bert", "gpt2", "mixtral", "llama4")
    return {name: StreamedModel(saved(name, tmp_path_factory.mktemp(name))) for name in names}


def saved(family: str, directory: Path, **changes: Tensor) -> Path:
    model = build(FAMILIES[family].architecture, FAMILIES[family].config)
    for name, value in changes.items():
        model.get_parameter(name.replace("__", ".")).data.copy_(value)
    return save(model, directory)


def groups_of(model: StreamedModel, schemes: Sequence[Scheme | None] = SCHEMES) -> list[Candidates]:
    return [Candidates((site.name,), tuple(schemes)) for site in model.sites]


def measured(
    cost: Cost,
    model: StreamedModel,
    groups: Sequence[Candidates],
    scratch: Path,
    *,
    batches: Sequence[Tensor] = BATCHES,
    solver: Solver = NEAREST,
) -> list[list[float]]:
    costs = cost.measure(model, batches, groups, solver=solver, seed=0, scratch=scratch / "kept")
    assert list(scratch.glob("kept*")) == []
    assert [len(row) for row in costs] == [len(group.schemes) for group in groups]
    assert all(math.isfinite(value) and value >= 0 for row in costs for value in row)
    return costs


def close(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> bool:
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
    return all(math.isclose(one, other, rel_tol=CLOSE, abs_tol=1e-7) for one, other in pairs)


def test_the_default_is_one_of_them() -> None:
    assert DEFAULT_COST in provided("pipeline.costs")


@every_cost
@every_family
def test_fewer_bits_cost_more(cost: Cost, family: str, models: dict[str, StreamedModel], tmp_path: Path) -> None:
    for two, four, eight in measured(cost, models[family], groups_of(models[family]), tmp_path):
        assert two > 2 * four > 8 * eight > 0


@every_cost
@every_family
def test_costs_do_not_depend_on_how_windows_are_put_into_batches(
    cost: Cost, family: str, models: dict[str, StreamedModel], tmp_path: Path
) -> None:
    groups = groups_of(models[family], SCHEMES[:2])
    windows = torch.cat(BATCHES)
    found = [
        measured(cost, models[family], groups, tmp_path, batches=list(windows.split(size)))
        for size in (1, 2, len(windows))
    ]
    assert close(found[0], found[1])
    assert close(found[0], found[2])


@every_cost
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_costs_are_the_same_every_time_on_any_number_of_threads(
    cost: Cost, family: str, models: dict[str, StreamedModel], tmp_path: Path
) -> None:
    groups = groups_of(models[family], SCHEMES[:2])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (2, 2, 1):
            torch.set_num_threads(threads)
            found.append(measured(cost, models[family], groups, tmp_path))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]
    assert close(found[0], found[2])


@every_cost
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_neither_the_order_nor_the_other_groups_and_schemes_matter(
    cost: Cost, family: str, models: dict[str, StreamedModel], tmp_path: Path
) -> None:
    groups = groups_of(models[family])
    found = measured(cost, models[family], groups, tmp_path)
    turned = [Candidates(group.sites, group.schemes[::-1]) for group in reversed(groups)]
    again = measured(cost, models[family], turned, tmp_path)
    assert [row[::-1] for row in reversed(again)] == found
    for number in (2, len(groups) - 1):
        alone = Candidates(groups[number].sites, groups[number].schemes[1:2])
        assert measured(cost, models[family], [alone], tmp_path) == [found[number][1:2]]


@every_cost
def test_what_stays_in_float_costs_nothing(cost: Cost, models: dict[str, StreamedModel], tmp_path: Path) -> None:
    model = models["llama"]
    [first, second, *_] = groups_of(model)
    groups = [replace(first, schemes=(None, *SCHEMES[:1], None)), replace(second, schemes=(None,))]
    [[none, some, again], alone] = measured(cost, model, groups, tmp_path)
    assert (none, again, alone) == (0, 0, [0])
    assert some > 0
    assert measured(cost, model, [], tmp_path) == []


@every_cost
def test_a_weight_that_the_scheme_holds_exactly_costs_nothing(cost: Cost, tmp_path: Path) -> None:
    # Every group of a row has the largest value of int8 that there is, so that the scale is 2^-7.
    values = torch.randint(-127, 128, (32, 32)).float()
    values[:, ::8] = 127
    name = "model.layers.0.self_attn.q_proj"
    model = StreamedModel(saved("llama", tmp_path / "model", model__layers__0__self_attn__q_proj__weight=values / 128))
    scheme = parse_scheme("int8-g8-f32")
    solver = Nearest(fit="minmax")
    [row, other] = measured(cost, model, [
        Candidates((name,), (scheme, parse_scheme("int4-g8-f32"))),
        Candidates(("model.layers.0.self_attn.k_proj",), (scheme,)),
    ], tmp_path, solver=solver)  # fmt: skip
    assert row[0] <= 1e-9 < row[1]
    assert other[0] > 1e-9


@every_cost
@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_experts_have_costs_and_so_have_those_that_see_no_token(
    cost: Cost, family: str, models: dict[str, StreamedModel], tmp_path: Path
) -> None:
    model = models[family]
    groups = groups_of(model, SCHEMES[:1])
    [window] = token_batches((1,), length=2)
    measured(cost, model, groups, tmp_path, batches=[window[:, :1]])
    alive = [group for group in groups if ".experts." in group.sites[0]]
    assert all(row[0] > 0 for row in measured(cost, model, alive, tmp_path, batches=token_batches((8, 8, 8))))


@every_cost
@pytest.mark.parametrize(
    "names",
    [
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        ("lm_head", "model.layers.0.mlp.down_proj"),
    ],
)
def test_a_group_over_several_blocks_is_measured_as_one(
    cost: Cost, models: dict[str, StreamedModel], tmp_path: Path, names: tuple[str, ...]
) -> None:
    model = models["llama"]
    scheme = (parse_scheme("int8-g8-f32"),)
    groups = [Candidates(names, scheme), *(Candidates((name,), scheme) for name in names)]
    [[both], [one], [other]] = measured(cost, model, groups, tmp_path)
    assert both == pytest.approx(one + other, rel=0.5)
    assert both > max(one, other)


@every_cost
def test_an_untied_head_is_a_site_like_any_other(cost: Cost, models: dict[str, StreamedModel], tmp_path: Path) -> None:
    assert groups_of(models["llama"])[-1].sites == ("lm_head",)
    assert all(group.sites != ("lm_head",) for group in groups_of(models["gpt2"]))
    broken = StreamedModel(saved("llama", tmp_path / "model", lm_head__weight=torch.full((100, 32), math.nan)))
    with pytest.raises(WeightError, match=r"lm_head\.weight"):
        measured(cost, broken, [Candidates(("lm_head",), SCHEMES)], tmp_path)


@every_cost
def test_any_solver_makes_the_error(cost: Cost, models: dict[str, StreamedModel], tmp_path: Path) -> None:
    model, batches = models["llama"], token_batches((16,))
    groups = groups_of(model, (parse_scheme("int3-channel-f32"),))
    plain, careful = (
        measured(cost, model, groups, tmp_path, solver=solver, batches=batches) for solver in (NEAREST, Gptq())
    )
    assert plain != careful
    if cost.name != "linearity":
        # Which does not look at where inputs are large.
        assert sum(row[0] for row in careful) < sum(row[0] for row in plain)


@every_cost
def test_a_site_that_is_not_there_is_named(cost: Cost, models: dict[str, StreamedModel], tmp_path: Path) -> None:
    group = Candidates(("model.layers.9.mlp.down_proj",), SCHEMES)
    with pytest.raises(UsageError, match=r"model\.layers\.9\.mlp\.down_proj: not among the 15 sites"):
        cost.measure(models["llama"], BATCHES, [group], solver=NEAREST, seed=0, scratch=tmp_path / "kept")


@every_cost
def test_a_weight_that_is_no_number_is_named(cost: Cost, tmp_path: Path) -> None:
    broken = torch.full((32, 32), math.nan)
    model = StreamedModel(saved("llama", tmp_path / "model", model__layers__1__self_attn__q_proj__weight=broken))
    with pytest.raises(WeightError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        cost.measure(
            model,
            BATCHES,
            [Candidates(("model.layers.1.self_attn.q_proj",), SCHEMES)],
            solver=NEAREST,
            seed=0,
            scratch=tmp_path / "kept",
        )
