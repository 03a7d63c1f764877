"""The allocation: exact on whatever can be solved exactly, never above the budget, fast on a mixture of experts."""

from __future__ import annotations

import math
import pickle
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from pennyweight.core.errors import BudgetError, UsageError
from pennyweight.plan.allocate import Allocation, allocate
from pennyweight.plan.choices import Choice, Group, smallest
from pennyweight.schemes import parse_scheme
from tests.plan.instances import Table, from_arrays, groups_of, least_cost, mixture_of_experts

# Sums of the same costs in another order.
ROUNDING = 1e-12
# What HiGHS calls an integer and a constraint that is met; within it a worse plan may pass for the best.
HIGHS = 1e-5

SIZES = st.one_of(st.integers(0, 6), st.integers(0, 10**6), st.integers(0, 40).map(lambda power: 2**power))
COSTS = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, 1e-9]), st.floats(1e-9, 1e9), st.integers(0, 20).map(lambda power: 10.0**-power)
)
TABLES = st.lists(st.lists(st.tuples(SIZES, COSTS), min_size=1, max_size=6), min_size=1, max_size=6)


def check(groups: list[Group], plan: Allocation, budget: int) -> None:
    """What a plan says of itself is true, and it keeps to the budget."""
    chosen = [group.choices[choice] for group, choice in zip(groups, plan.choices, strict=True)]
    assert plan.size_bytes == sum(choice.size_bytes for choice in chosen) <= budget
    assert plan.cost == math.fsum(choice.cost for choice in chosen)
    assert plan.lower_bound <= plan.cost


@settings(max_examples=300, deadline=None)
@given(table=TABLES, share=st.floats(0, 1))
def test_small_instances_are_solved_exactly(table: Table, share: float) -> None:
    groups = groups_of(table)
    largest = sum(max(choice.size_bytes for choice in group.choices) for group in groups)
    budget = smallest(groups) + int(share * (largest - smallest(groups)))
    plan = allocate(groups, budget)
    check(groups, plan, budget)
    assert plan.cost == pytest.approx(least_cost(groups, budget), rel=ROUNDING, abs=0)
    assert plan.lower_bound == plan.cost


def curves(kind: str, groups: int, choices: int) -> list[Group]:
    rng = np.random.default_rng(7)
    size = np.sort(rng.integers(1, 1000, (groups, choices)), axis=1)
    cost = {
        "any": rng.random((groups, choices)),
        "concave": np.sqrt(1000.0 - size) * rng.uniform(0.9, 1.1, (groups, 1)),
        "proportional": 1000.0 - size,
        "nearly proportional": 1100.0 - size - 100.0 * (np.arange(choices) > 0),
        "a lattice": rng.lognormal(0, 2, (groups, 1)) * 4.0 ** -np.arange(choices),
    }[kind]
    if kind == "a lattice":
        size = np.repeat(64 * np.arange(2, 2 + choices)[None], groups, axis=0)
    return from_arrays(size, cost)


KINDS = ["any", "concave", "proportional", "nearly proportional", "a lattice"]


def by_integer_programme(groups: list[Group], budget: int) -> float:
    size = np.array([[choice.size_bytes for choice in group.choices] for group in groups])
    cost = np.array([[choice.cost for choice in group.choices] for group in groups])
    room = budget - size.min(axis=1).sum()
    rows, columns = size.shape
    one_each = scipy.sparse.kron(scipy.sparse.eye(rows), np.ones((1, columns)))
    fits = scipy.sparse.csr_matrix(((size - size.min(axis=1, keepdims=True)) / room).reshape(1, -1))
    result = milp(
        cost.ravel(),
        constraints=LinearConstraint(
            scipy.sparse.vstack([one_each, fits]), [*np.ones(rows), -np.inf], [*np.ones(rows), 1.0]
        ),
        integrality=np.ones(size.size),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0, "time_limit": 20},
    )
    assert result.status == 0
    return float(result.fun)


@pytest.mark.parametrize("share", [0.03, 0.3, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_with_an_integer_programme(kind: str, share: float) -> None:
    groups = curves(kind, 25, 6)
    budget = int(smallest(groups) + share * (smallest(groups) + 25 * 500))
    plan = allocate(groups, budget)
    check(groups, plan, budget)
    assert plan.cost == pytest.approx(by_integer_programme(groups, budget), rel=HIGHS)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_a_model_of_200_groups_is_solved_exactly(share: float) -> None:
    groups = mixture_of_experts(200, 8)
    budget = int(smallest(groups) * (1 + share))
    plan = allocate(groups, budget)
    check(groups, plan, budget)
    assert plan.lower_bound == plan.cost
    assert plan.cost == pytest.approx(by_integer_programme(groups, budget), rel=HIGHS)


@pytest.mark.parametrize("kind", ["concave", "nearly proportional"])
def test_where_lists_are_cut_short_the_plan_is_near_its_bound_and_no_change_would_help(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pennyweight.plan.search._WORK", 30_000)
    groups = curves(kind, 400, 8)
    budget = int(smallest(groups) * 1.7)
    plan = allocate(groups, budget)
    check(groups, plan, budget)
    assert plan.cost / 1.001 <= plan.lower_bound < plan.cost
    for group, choice in zip(groups, plan.choices, strict=True):
        mine = group.choices[choice]
        room = budget - plan.size_bytes + mine.size_bytes
        assert not [other for other in group.choices if other.size_bytes <= room and other.cost < mine.cost]


@settings(max_examples=200, deadline=None)
@example(table=[[(0, 1.0), (1, 0.0)], [(0, 1.0), (10835, 0.0)], [(0, 21675.0), (10837, 0.0)]], share=0.5, work=1_010)
@given(table=TABLES, share=st.floats(0, 1), work=st.sampled_from([0, 1_010, 2_100]))
def test_the_bound_of_a_search_cut_short_holds(table: Table, share: float, work: int) -> None:
    groups = groups_of(table)
    largest = sum(max(choice.size_bytes for choice in group.choices) for group in groups)
    budget = smallest(groups) + int(share * (largest - smallest(groups)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pennyweight.plan.search._WORK", work)
        plan = allocate(groups, budget)
    check(groups, plan, budget)
    best = least_cost(groups, budget)
    assert plan.lower_bound <= best * (1 + ROUNDING) <= plan.cost * (1 + 2 * ROUNDING)


@pytest.mark.parametrize("same_size", [True, False])
def test_a_mixture_of_experts_takes_less_than_five_seconds(same_size: bool) -> None:
    groups = mixture_of_experts(60 * 256 * 3, 12, same_size=same_size)
    budget = int(smallest(groups) * 1.6)
    start = time.process_time()
    plan = allocate(groups, budget)
    assert time.process_time() - start < 5
    check(groups, plan, budget)
    assert plan.lower_bound == plan.cost
    assert plan.size_bytes > 0.9999 * budget


def test_a_larger_budget_never_costs_more() -> None:
    groups = curves("concave", 12, 6)
    budgets = range(smallest(groups), smallest(groups) + 4000, 37)
    costs = [allocate(groups, budget).cost for budget in budgets]
    assert all(later <= earlier for earlier, later in pairwise(costs))
    assert costs[-1] < costs[0]


def test_of_equal_choices_the_smaller_then_the_earlier_is_taken() -> None:
    assert allocate(groups_of([[(9, 1.0), (5, 1.0), (7, 1.0), (5, 1.0)]]), 100).choices == (1,)
    assert allocate(groups_of([[(5, 2.0), (9, 0.0), (9, 0.0)], [(3, 0.0), (3, 0.0)]]), 12).choices == (1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_groups_give_the_same_plan(kind: str) -> None:
    groups = curves(kind, 60, 8)
    again = [replace(group, choices=tuple(replace(choice) for choice in group.choices)) for group in groups]
    budget = int(smallest(groups) * 1.5)
    assert allocate(groups, budget) == allocate(tuple(again), budget)


def test_choices_that_another_beats_change_nothing() -> None:
    groups = curves("any", 30, 5)
    budget = int(smallest(groups) * 1.5)
    worse = [
        replace(group, choices=(*group.choices, *(Choice(None, c.size_bytes + 1, c.cost + 1) for c in group.choices)))
        for group in groups
    ]
    assert allocate(worse, budget) == allocate(groups, budget)


def test_sizes_and_costs_of_very_different_magnitude_keep_their_precision() -> None:
    giant = [(10**15, 1e9), (10**15 + 1, 1e9 - 1.0), (3 * 10**15, 0.0)]
    small = [(10, 3e-7), (11, 2e-7), (12, 1e-7)]
    plan = allocate(groups_of([giant, small, small]), 10**15 + 24)
    assert plan.choices == (1, 2, 1) or plan.choices == (1, 1, 2)


def test_the_ends_of_the_range() -> None:
    groups = groups_of([[(4, 1.0), (8, 0.5)], [(2, 3.0)]])
    assert allocate(groups, 6) == Allocation((0, 0), 6, 4.0, 4.0)
    assert allocate(groups, 10) == allocate(groups, 10**18) == Allocation((1, 0), 10, 3.5, 3.5)
    assert allocate([], 0) == Allocation((), 0, 0.0, 0.0)


def test_a_plan_gives_each_site_the_scheme_of_its_group() -> None:
    int4, int8 = parse_scheme("int4-g128"), parse_scheme("int8-channel")
    groups = [
        Group(("q", "k"), (Choice(int4, 10, 1.0), Choice(int8, 20, 0.1))),
        Group(("head",), (Choice(None, 30, 0.0),)),
    ]
    assert allocate(groups, 40).schemes(groups) == {"q": int4, "k": int4, "head": None}
    assert allocate(groups, 50).schemes(groups) == {"q": int8, "k": int8, "head": None}


def test_a_budget_below_the_smallest_plan_says_what_can_be_reached() -> None:
    groups = groups_of([[(4_000, 1.0), (8_000, 0.5)], [(2_500, 3.0)]])
    with pytest.raises(BudgetError, match="6,499 bytes can't be reached .* smallest plan takes 6,500 bytes") as caught:
        allocate(groups, 6_499)
    assert (caught.value.asked, caught.value.smallest) == (6_499, smallest(groups))
    advised = BudgetError(1, 2, "allow int2")
    assert str(advised).endswith("takes 2 bytes; allow int2")
    assert str(pickle.loads(pickle.dumps(advised))) == str(advised)


@pytest.mark.parametrize(
    ("group", "says"),
    [
        (Group(("up",), ()), "'up'.*needs a site and a choice"),
        (Group((), (Choice(None, 1, 1.0),)), "needs a site and a choice"),
        (Group(("up",), (Choice(None, 1, math.nan),)), "up: keep has cost nan"),
        (Group(("up",), (Choice(parse_scheme("int4-g128"), 1, math.inf),)), "up: int4-g128 has cost inf"),
        (Group(("up",), (Choice(None, 1, -1.0),)), "up: keep has cost -1.0"),
        (Group(("up",), (Choice(None, -1, 1.0),)), "up: keep .* -1 bytes"),
        (Group(("up",), (Choice(None, 2**61, 1.0),)), "bytes together, over"),
    ],
)
def test_what_cannot_be_allocated_is_refused(group: Group, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        allocate([*groups_of([[(1, 1.0)]]), group], 100)
