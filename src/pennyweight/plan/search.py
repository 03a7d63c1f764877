"""The exact step of an allocation: lists of states over what the moves along the hulls leave undecided.

The moves end with a plan that leaves `room` bytes, and with the gain per byte of the first move that no longer fits,
`price`. Every other choice of a group is a change (size, cost) from that plan. Since the plan minimises
cost + price * size, each change has an excess = cost + price * size >= 0, and changes that fit the room have

    sum(cost)  =  sum(excess) - price * sum(size)  >=  sum(excess) - price * room.

So a change whose excess alone is no less than what lies between the best plan known and -price * room is in no better
plan: it is left out (reduced-cost fixing). The groups that keep changes are added one after the other to a list of
states (size, cost), those first whose changes lie nearest to the line -price * size. A state goes if another is as
small and as cheap, or if even the steepest changes of the groups to come cannot make it the best (D. Pisinger, A
minimal algorithm for the multiple-choice knapsack problem, European J. of Operational Research 83, 1995). A list that
grows too long keeps the states whose bounds promise most; the best bound among the others is what the result may miss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pennyweight.plan.table import Bools, Floats, Ints, Table

# What one pass over the groups may do, in states made (about a second), and what a group costs besides its states.
_WORK = 4_000_000
_GROUP_WORK = 1_000
# Work is shared among at most so many groups: those that come first matter most.
_SHARES = 1_000
_PASSES = 3


@dataclass(frozen=True)
class Found:
    """columns: the best plan found. gap: no plan within the room costs less by more than this; 0 where it is proven."""

    columns: Ints
    gap: float


@dataclass(frozen=True)
class _Core:
    """Changes that a better plan may have: those of group k are [start[k], start[k + 1]).

    saves, pays: what groups after the k-th save at most for a byte more, and cost at least for a byte less.
    """

    row: Ints
    column: Ints
    size: Ints
    cost: Floats
    excess: Floats
    start: Ints
    saves: Floats
    pays: Floats


@dataclass(frozen=True)
class _Step:
    """What one group of the core added: state i, of those kept, is number kept[i] of (no change, changes...) x (the
    `before` states before it)."""

    changes: Ints
    before: int
    kept: Ints


@dataclass(frozen=True)
class _Result:
    """cost: the best sum of changes, 0 for none. changes: which they are. missed: the best bound of a dropped state."""

    cost: float
    changes: list[int]
    missed: float


def improve(table: Table, columns: Ints, *, room: int, price: float) -> Found:
    """The best plan that takes at most `room` bytes more than `columns`, which minimises cost + `price` * size."""
    rows = np.arange(len(columns))
    size = table.size - table.size[rows, columns][:, None]
    cost = table.cost - table.cost[rows, columns][:, None]
    excess = np.maximum(cost + price * size, 0.0)
    excess[rows, columns] = np.inf
    best, proven, found = 0.0, -price * room, columns
    for _ in range(_PASSES):
        # Changes come in whole steps: what the room has beyond them is out of reach.
        step = int(np.gcd.reduce(size[excess < best + price * room], initial=0))
        reachable = room // step * step if step else 0
        line = -price * reachable
        is_open = excess < best - line
        if not is_open.any():
            return Found(found, 0.0)
        core = _core(size, cost, excess, is_open, price)
        result = _search(core, reachable, line, best)
        if result.changes:
            found = columns.copy()
            found[core.row[result.changes]] = core.column[result.changes]
        best, proven = result.cost, max(line, result.missed)
        if proven >= best:
            return Found(found, 0.0)
        if not result.changes:
            break
    filled = _fill(table, found, room - int(size[rows, found].sum()))
    return Found(filled, max(float((cost[rows, filled]).sum()) - proven, 0.0))


def _fill(table: Table, columns: Ints, room: int) -> Ints:
    """Makes the single change that saves most and fits, until none does: a list cut short may leave some."""
    columns, rows = columns.copy(), np.arange(len(columns))
    while True:
        size = table.size - table.size[rows, columns][:, None]
        cost = table.cost - table.cost[rows, columns][:, None]
        saved = np.where(size <= room, -cost, 0.0)
        row, column = np.unravel_index(int(np.argmax(saved)), saved.shape)
        if saved[row, column] <= 0:
            return columns
        room -= int(size[row, column])
        columns[row] = column


def _core(size: Ints, cost: Floats, excess: Floats, is_open: Bools, price: float) -> _Core:
    row, column = np.nonzero(is_open)
    distance = excess[is_open] / np.abs(size[is_open])
    nearest = np.full(len(size), np.inf)
    np.minimum.at(nearest, row, distance)
    order = np.lexsort((column, row, nearest[row]))
    row, column, distance = row[order], column[order], distance[order]
    change = (row, column)
    start = np.flatnonzero(np.diff(row, prepend=-1, append=-1))
    above = _least_later(np.where(size[change] > 0, distance, np.inf), start)
    below = _least_later(np.where(size[change] < 0, distance, np.inf), start)
    return _Core(
        row,
        column,
        size[change],
        cost[change],
        excess[change],
        start,
        saves=np.maximum(price - above, 0.0),
        pays=price + below,
    )


def _least_later(distance: Floats, start: Ints) -> Floats:
    """For each group the least distance in all groups after it; infinity after the last."""
    least = np.minimum.reduceat(distance, start[:-1])
    return np.append(np.minimum.accumulate(least[::-1])[::-1][1:], np.inf)


def _search(core: _Core, room: int, line: float, best: float) -> _Result:
    """The best changes within `room` that cost less than `best`; any cost `line` and their summed excess or more."""
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    steps: list[_Step] = []
    changes: list[int] = []
    work, missed = _WORK, math.inf
    for k, (first, end) in enumerate(zip(core.start[:-1], core.start[1:], strict=True)):
        mine = first + np.flatnonzero(core.excess[first:end] < best - line)
        if len(mine) == 0:
            continue
        before = len(size)
        size = (np.append(0, core.size[mine])[:, None] + size).ravel()
        cost = (np.append(0.0, core.cost[mine])[:, None] + cost).ravel()
        steps.append(_Step(mine, before, np.zeros(0, np.int64)))
        fitting = np.flatnonzero((size <= room) & (cost < best))
        if len(fitting):
            winner = fitting[np.lexsort((size[fitting], cost[fitting]))[0]]
            best, changes = float(cost[winner]), _follow(steps, int(winner))
        over = size - room
        promise = cost + over * np.where(over > 0, core.pays[k], core.saves[k])
        work = max(work - len(size) - _GROUP_WORK, 0)
        later = int(np.count_nonzero(core.excess[end:] < best - line))
        longest = work // (1 + min(later, _SHARES))
        kept, dropped = _keep(over, cost, np.where(promise < best, promise, np.inf), longest)
        steps[-1] = _Step(mine, before, kept)
        missed = min(missed, dropped)
        size, cost = size[kept], cost[kept]
        if len(size) == 0:
            break
    return _Result(best, changes, missed)


def _keep(over: Ints, cost: Floats, promise: Floats, longest: int) -> tuple[Ints, float]:
    """Which states of finite promise stay, and the best promise of those that only the length of the list rules out.

    Of a list too long those with the best promise stay, of the same promise those whose size is nearest to the room.
    """
    kept = np.flatnonzero(np.isfinite(promise))
    kept = kept[np.lexsort((cost[kept], over[kept]))]
    falls = np.ones(len(kept), bool)
    falls[1:] = cost[kept][1:] < np.minimum.accumulate(cost[kept])[:-1]
    kept = kept[falls]
    if len(kept) <= longest:
        return kept, math.inf
    best_first = np.lexsort((np.abs(over[kept]), promise[kept]))
    return kept[np.sort(best_first[:longest])], float(promise[kept[best_first[longest]]])


def _follow(steps: list[_Step], number: int) -> list[int]:
    """The changes of state `number` of the last step, before any was dropped."""
    changes = []
    for t in range(len(steps) - 1, -1, -1):
        change, state = divmod(number, steps[t].before)
        if change:
            changes.append(int(steps[t].changes[change - 1]))
        if t:
            number = int(steps[t - 1].kept[state])
    return changes
