"""The choices of all groups as arrays, without those that another choice of the same group beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from pennyweight.core.errors import UsageError
from pennyweight.plan.choices import Group, choice_name

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Sums of sizes stay exact in int64, and products with float64 lose nothing that a file's size could show.
_MOST_BYTES = 2**60


@dataclass(frozen=True)
class Table:
    """One row for each group, its choices from the smallest on; rows end in padding of infinite cost.

    Along a row size rises and cost falls, both strictly: of choices with the same cost the smallest stays, of equal
    ones the first.

    size:     [groups, columns] bytes above the smallest choice of the group
    cost:     [groups, columns]
    place:    [groups, columns] which of the group's choices it is
    smallest: bytes of the smallest plan
    """

    size: Ints
    cost: Floats
    place: Ints
    smallest: int

    def cost_of(self, columns: Ints) -> float:
        """The cost where group g takes `columns[g]`, rounded once: it depends on nothing but the plan."""
        costs: list[float] = self.cost[np.arange(len(columns)), columns].tolist()
        return math.fsum(costs)

    def size_of(self, columns: Ints) -> int:
        return self.smallest + int(self.size[np.arange(len(columns)), columns].sum())

    def choices_of(self, columns: Ints) -> tuple[int, ...]:
        return tuple(self.place[np.arange(len(columns)), columns].tolist())


def tabulate(groups: Sequence[Group]) -> Table:
    """Raises UsageError for a group without sites or choices, a cost that is no number from 0 on, a negative size."""
    choices = list(chain.from_iterable(group.choices for group in groups))
    _check(groups)
    lengths = np.array([len(group.choices) for group in groups], np.int64)
    is_real = np.arange(lengths.max(initial=1)) < lengths[:, None]
    size = np.zeros(is_real.shape, np.int64)
    cost = np.full(is_real.shape, np.inf)
    size[is_real] = np.fromiter((choice.size_bytes for choice in choices), np.int64, len(choices))
    cost[is_real] = np.fromiter((choice.cost for choice in choices), np.float64, len(choices))
    return _undominated(size, cost)


def _check(groups: Sequence[Group]) -> None:
    total = 0
    for group in groups:
        if not (group.sites and group.choices):
            raise UsageError(f"{group.sites[:1]}: a group needs a site and a choice: allow a scheme or keep it")
        for choice in group.choices:
            if not (0 <= choice.cost < math.inf and choice.size_bytes >= 0):
                raise UsageError(
                    f"{group.sites[0]}: {choice_name(choice.scheme)} has cost {choice.cost} and {choice.size_bytes} "
                    "bytes; costs are finite, and neither is negative"
                )
        total += max(choice.size_bytes for choice in group.choices)
    if total > _MOST_BYTES:
        raise UsageError(f"the largest choices of all groups take {total:,} bytes together, over {_MOST_BYTES:,}")


def _undominated(size: Ints, cost: Floats) -> Table:
    order = np.lexsort((cost, np.where(np.isinf(cost), _MOST_BYTES, size)), axis=1)
    size, cost = np.take_along_axis(size, order, 1), np.take_along_axis(cost, order, 1)
    keep = np.ones(cost.shape, bool)
    keep[:, 1:] = cost[:, 1:] < np.minimum.accumulate(cost, axis=1)[:, :-1]
    # Those that stay move to the front of their row, in order; the rest becomes padding.
    front = np.argsort(~keep, axis=1, kind="stable")
    cost = np.take_along_axis(np.where(keep, cost, np.inf), front, 1)
    size = np.where(np.isinf(cost), 0, np.take_along_axis(size, front, 1))
    base = size[:, 0]
    width = int(keep.sum(axis=1).max(initial=1))
    return Table(
        np.where(np.isinf(cost), 0, size - base[:, None])[:, :width],
        cost[:, :width],
        np.take_along_axis(order, front, 1)[:, :width],
        int(base.sum()),
    )
