"""The frontier: the best plans from the smallest size to that of the least cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import getitem

import numpy as np

from pennyweight.core.errors import UsageError
from pennyweight.plan.allocate import Allocation, allocate_table, allocation_of
from pennyweight.plan.choices import Group
from pennyweight.plan.hull import Path, walk_hulls
from pennyweight.plan.table import Table, tabulate
from pennyweight.schemes import Scheme


@dataclass(frozen=True)
class Point:
    """schemes: of each group of the frontier; None: kept in float."""

    size_bytes: int
    cost: float
    schemes: tuple[Scheme | None, ...]


@dataclass(frozen=True)
class Frontier:
    """sites: of each group. points: from the smallest on; cost falls strictly as size rises. weights: how many all
    sites have together, if known."""

    sites: tuple[tuple[str, ...], ...]
    points: tuple[Point, ...]
    weights: int | None = None

    def bpw(self, point: Point) -> float | None:
        """Bits that `point` takes for each weight."""
        return None if self.weights is None else 8 * point.size_bytes / self.weights

    def schemes(self, point: Point) -> dict[str, Scheme | None]:
        """The scheme of each site in the plan of `point`."""
        return {site: scheme for sites, scheme in zip(self.sites, point.schemes, strict=True) for site in sites}


def frontier(groups: Sequence[Group], *, points: int = 100, weights: int | None = None) -> Frontier:
    """At most `points` plans, their sizes about the same factor apart.

    Each is the best of its size. Where moves along the hulls lead to a size between two steps, it is the largest of
    these plans; elsewhere the step is allocated as a budget of its own.
    """
    if points < 2:
        raise UsageError(f"a frontier of {points} points: ask for 2 or more")
    table = tabulate(groups)
    path = walk_hulls(table)
    schemes = [tuple(choice.scheme for choice in group.choices) for group in groups]
    kept: list[Point] = []
    for plan in _plans(table, path, points):
        if not kept or (plan.size_bytes > kept[-1].size_bytes and plan.cost < kept[-1].cost):
            kept.append(Point(plan.size_bytes, plan.cost, tuple(map(getitem, schemes, plan.choices))))
    return Frontier(tuple(group.sites for group in groups), tuple(kept), weights)


def _plans(table: Table, path: Path, points: int) -> Iterator[Allocation]:
    largest = table.smallest + (int(path.size[-1]) if len(path.size) else 0)
    between = np.geomspace(max(table.smallest, 1), max(largest, 1), points)[1:-1]
    last_budget = -1
    for budget in [table.smallest, *between.astype(np.int64).tolist(), largest]:
        moves = path.moves_within(budget - table.smallest)
        size_bytes = table.smallest + (int(path.size[moves - 1]) if moves else 0)
        if size_bytes > last_budget:
            yield allocation_of(table, path.columns(moves), gap=0.0)
        else:
            yield allocate_table(table, path, budget)
        last_budget = budget
