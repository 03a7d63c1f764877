"""The cheap moves from the smallest plan to the best one: along each group's convex hull, most gain per byte first.

After any number of these moves no plan of the same size costs less: it is the plan that minimises
sum(cost + price * size) for some price of a byte (the Lagrangian), and all of these plans are found by one sort
(E. Zemel, The linear multiple choice knapsack problem, Operations Research 28, 1980).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pennyweight.plan.table import Floats, Ints, Table


@dataclass(frozen=True)
class Path:
    """Moves in order. group: whose. column: the table's column after the move. gain: cost saved per byte, never rising.
    size: bytes above the smallest plan once the move is made. groups: how many there are."""

    group: Ints
    column: Ints
    gain: Floats
    size: Ints
    groups: int

    def moves_within(self, room: int) -> int:
        """How many moves fit in `room` bytes above the smallest plan."""
        return int(np.searchsorted(self.size, room, side="right"))

    def columns(self, moves: int) -> Ints:
        """The column of each group after the first `moves` moves."""
        columns = np.zeros(self.groups, np.int64)
        np.maximum.at(columns, self.group[:moves], self.column[:moves])
        return columns


def walk_hulls(table: Table) -> Path:
    """All moves along the lower convex hulls of (size, cost), each hull walked from its smallest choice on."""
    rows, at = np.arange(len(table.size)), np.zeros(len(table.size), np.int64)
    gain = np.full(len(rows), np.inf)
    steps: list[tuple[Ints, Ints, Ints, Floats]] = []
    while len(rows):
        here = (rows, at[rows])
        gains = _gains(table.size[rows] - table.size[here][:, None], table.cost[here][:, None] - table.cost[rows])
        # The last column of the greatest gain: points on one line are one move.
        column = gains.shape[1] - 1 - np.argmax(gains[:, ::-1], axis=1)
        best = gains[np.arange(len(rows)), column]
        goes_on = best >= 0
        rows, column, best = rows[goes_on], column[goes_on], best[goes_on]
        # Rounding must not let a later move look better than the one before it.
        gain[rows] = np.minimum(gain[rows], best)
        steps.append((rows, column, table.size[rows, column] - table.size[rows, at[rows]], gain[rows]))
        at[rows] = column
    return _in_order(steps, len(table.size))


def _gains(bytes_more: Ints, saved: Floats) -> Floats:
    """What each column saves per byte more; -1 where it is no larger, or padding."""
    gains: Floats = np.divide(saved, bytes_more, out=np.full(saved.shape, -1.0), where=(bytes_more > 0) & (saved > 0))
    return gains


def _in_order(steps: list[tuple[Ints, Ints, Ints, Floats]], groups: int) -> Path:
    group = np.concatenate([step[0] for step in steps] or [np.zeros(0, np.int64)])
    column = np.concatenate([step[1] for step in steps] or [np.zeros(0, np.int64)])
    size = np.concatenate([step[2] for step in steps] or [np.zeros(0, np.int64)])
    gain = np.concatenate([step[3] for step in steps] or [np.zeros(0)])
    # Stable, and steps were appended in order: moves of one group with the same gain stay in sequence.
    order = np.lexsort((group, -gain))
    return Path(group[order], column[order], gain[order], np.cumsum(size[order]), groups)
