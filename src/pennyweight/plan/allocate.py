"""Which way of storing each group gives the least total cost within a size: a multiple-choice knapsack.

    minimise  sum_g cost[g, j(g)]   subject to  sum_g size[g, j(g)] <= size_bytes

First along the convex hull of each group, most gain per byte first, up to the move that no longer fits (`hull`); then
exactly over the choices that may still matter (`search`). Where that search has to cut its lists short, what it may
have missed is in `Allocation.lower_bound`.

The same groups in the same order give the same plan. Of choices of one group that cost the same the smallest is taken,
and the first of equal ones; of plans that cost the same, the one that the search meets first: the hull's own, then
fewer bytes within a step of the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pennyweight.core.errors import BudgetError
from pennyweight.plan.choices import Group
from pennyweight.plan.hull import Path, walk_hulls
from pennyweight.plan.search import improve
from pennyweight.plan.table import Ints, Table, tabulate
from pennyweight.schemes import Scheme


@dataclass(frozen=True)
class Allocation:
    """choices: the index of each group's choice. lower_bound: no plan within the budget costs less; equal to `cost`
    where the plan is proven to be the best."""

    choices: tuple[int, ...]
    size_bytes: int
    cost: float
    lower_bound: float

    def schemes(self, groups: Sequence[Group]) -> dict[str, Scheme | None]:
        """The scheme of each site of `groups`, those that were allocated; None: kept in float."""
        return {
            site: group.choices[choice].scheme
            for group, choice in zip(groups, self.choices, strict=True)
            for site in group.sites
        }


def allocate(groups: Sequence[Group], size_bytes: int) -> Allocation:
    """The plan of least cost that takes at most `size_bytes`.

    Raises BudgetError where even the smallest plan takes more, UsageError for a group without choices or with a cost
    or size that is none.
    """
    table = tabulate(groups)
    return allocate_table(table, walk_hulls(table), size_bytes)


def allocate_table(table: Table, path: Path, size_bytes: int) -> Allocation:
    """`allocate` for groups already tabulated, with the `path` along their hulls."""
    if size_bytes < table.smallest:
        raise BudgetError(size_bytes, table.smallest)
    room = size_bytes - table.smallest
    moves = path.moves_within(room)
    columns = path.columns(moves)
    if moves == len(path.gain):
        return allocation_of(table, columns, gap=0.0)
    used = int(path.size[moves - 1]) if moves else 0
    found = improve(table, columns, room=room - used, price=float(path.gain[moves]))
    return allocation_of(table, found.columns, gap=found.gap)


def allocation_of(table: Table, columns: Ints, *, gap: float) -> Allocation:
    """The plan in which group g takes `columns[g]`, at most `gap` above the least cost of its budget."""
    cost = table.cost_of(columns)
    return Allocation(table.choices_of(columns), table.size_of(columns), cost, max(cost - gap, 0.0))
