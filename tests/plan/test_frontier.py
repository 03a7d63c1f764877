"""The frontier: each point the best of its size, the same after a round trip through its file."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pennyweight.core.errors import UsageError
from pennyweight.plan.allocate import allocate
from pennyweight.plan.choices import Choice, Group, smallest
from pennyweight.plan.frontier import Point, frontier
from pennyweight.plan.frontier_file import frontier_record, read_frontier, write_frontier
from pennyweight.schemes import parse_scheme
from tests.plan.instances import from_arrays, groups_of, least_cost, mixture_of_experts

INT2, INT4, INT8 = (parse_scheme(name) for name in ("int2-g64", "int4-g128", "int8-channel"))
GROUPS = [
    Group(("0.q", "0.k"), (Choice(INT2, 200, 4.0), Choice(INT4, 400, 1.0), Choice(None, 1600, 0.0))),
    Group(("0.down",), (Choice(INT2, 100, 9.0), Choice(INT8, 800, 0.5))),
]


def sparse() -> list[Group]:
    """Few sizes, and costs far above their hulls: most steps need an allocation of their own."""
    rng = np.random.default_rng(3)
    size = np.sort(rng.integers(1, 10_000, (6, 5)), axis=1)
    return from_arrays(size, np.sqrt(10_000.0 - size) * rng.uniform(0.5, 1.5, (6, 1)))


@pytest.mark.parametrize("groups", [sparse(), mixture_of_experts(6, 5)], ids=["sparse", "dense"])
def test_every_point_is_the_best_plan_of_its_size(groups: list[Group]) -> None:
    line = frontier(groups)
    assert len(line.points) > 20
    for point in line.points:
        assert point.cost == pytest.approx(least_cost(groups, point.size_bytes), rel=1e-12)


@pytest.mark.parametrize("groups", [sparse(), mixture_of_experts(300, 8)], ids=["sparse", "dense"])
def test_it_runs_from_the_smallest_plan_to_the_least_cost(groups: list[Group]) -> None:
    points = frontier(groups, points=40).points
    assert points[0].size_bytes == smallest(groups)
    assert points[-1].cost == pytest.approx(sum(min(c.cost for c in group.choices) for group in groups))
    assert all(a.size_bytes < b.size_bytes and a.cost > b.cost for a, b in pairwise(points))
    assert len(points) <= 40


def test_sizes_are_the_same_factor_apart() -> None:
    points = frontier(mixture_of_experts(3000, 8), points=50).points
    steps = [b.size_bytes / a.size_bytes for a, b in pairwise(points)]
    assert len(points) == 50
    assert max(steps) < min(steps) * 1.01


@pytest.mark.parametrize("groups", [sparse(), mixture_of_experts(20, 8)], ids=["sparse", "dense"])
def test_a_budget_costs_no_more_on_it_than_the_best_plan_one_step_below(groups: list[Group]) -> None:
    points = frontier(groups, points=30).points
    budgets = np.geomspace(points[0].size_bytes, points[-1].size_bytes, 30).astype(int).tolist()
    for below, budget in pairwise(budgets[:-1]):
        cost = min(point.cost for point in points if point.size_bytes <= budget)
        assert cost <= allocate(groups, below).cost


def test_a_large_model_takes_less_than_ten_seconds() -> None:
    groups = mixture_of_experts(60 * 256 * 3, 12)
    start = time.process_time()
    line = frontier(groups)
    assert time.process_time() - start < 10
    assert len(line.points) == 100


def test_points_know_their_schemes_and_bits() -> None:
    line = frontier(GROUPS, weights=800)
    assert line.schemes(line.points[0]) == {"0.q": INT2, "0.k": INT2, "0.down": INT2}
    assert line.bpw(line.points[0]) == 3.0
    assert line.schemes(line.points[-1]) == {"0.q": None, "0.k": None, "0.down": INT8}
    assert frontier(GROUPS).bpw(line.points[0]) is None


def test_a_frontier_of_one_plan_and_of_no_bytes() -> None:
    assert [point.size_bytes for point in frontier(groups_of([[(7, 2.0), (9, 2.0)]])).points] == [7]
    assert [point.size_bytes for point in frontier(groups_of([[(0, 2.0), (9, 1.0)]])).points] == [0, 9]
    assert frontier([]).points == (Point(0, 0.0, ()),)
    with pytest.raises(UsageError, match="a frontier of 1 points"):
        frontier(GROUPS, points=1)


def test_the_file_says_what_changes_from_point_to_point(tmp_path: Path) -> None:
    write_frontier(tmp_path / "frontier.json", frontier(GROUPS, weights=800))
    record = json.loads((tmp_path / "frontier.json").read_text())
    assert record["groups"] == [["0.q", "0.k"], ["0.down"]]
    assert [point["changes"] for point in record["points"]] == [
        {"0.q": "int2-g64", "0.down": "int2-g64"},
        {"0.q": "int4-g128"},
        {"0.q": "int2-g64", "0.down": "int8-channel"},
        {"0.q": "int4-g128"},
        {"0.q": "keep"},
    ]
    assert [point["size_bytes"] for point in record["points"]] == [300, 500, 1000, 1200, 2400]
    assert record["points"][1] == {
        "size_bytes": 500, "bpw": 5.0, "predicted_loss": 10.0, "changes": {"0.q": "int4-g128"}
    }  # fmt: skip


@pytest.mark.parametrize("weights", [800, None])
def test_what_was_written_is_read_back(tmp_path: Path, weights: int | None) -> None:
    line = frontier(GROUPS, weights=weights)
    write_frontier(tmp_path / "frontier.json", line)
    first = (tmp_path / "frontier.json").read_bytes()
    assert read_frontier(tmp_path / "frontier.json") == line
    write_frontier(tmp_path / "frontier.json", frontier(GROUPS, weights=weights))
    assert (tmp_path / "frontier.json").read_bytes() == first
    assert ("bpw" in frontier_record(line)["points"][0]) == (weights is not None)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"pennyweight_frontier": 2}', '{"pennyweight_frontier": 1, "weights": null, "groups": [[]]}',
     '{"pennyweight_frontier": 1, "weights": null, "groups": [["a"]], "points": [{"size_bytes": 1,'
     ' "predicted_loss": 1.0, "changes": {}}]}'],
)  # fmt: skip
def test_what_is_no_frontier_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UsageError, match="other.json is not a frontier that this version can read"):
        read_frontier(tmp_path / "other.json")
    with pytest.raises(UsageError, match="missing.json is not a frontier"):
        read_frontier(tmp_path / "missing.json")
