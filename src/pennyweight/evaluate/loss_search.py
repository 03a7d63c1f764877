"""Which plan of a frontier is tried next for a budget of loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from pennyweight.plan.frontier import Point

# The search ends where the next smaller plan that was not tried is this much smaller at most.
_CLOSE = 0.01
_TRIALS = 12


class Outcome(Protocol):
    """A plan that was looked at: its predicted loss, the upper bound of what was measured, whether that is allowed."""

    @property
    def predicted(self) -> float: ...
    @property
    def upper(self) -> float: ...
    @property
    def holds(self) -> bool: ...


Tried = TypeVar("Tried", bound=Outcome)


class Search(Generic[Tried]):
    """Which of `points`, from small to large, is looked at next."""

    def __init__(self, points: Sequence[Point], limit: float, *, scale: float = 1.0) -> None:
        """scale: the loss that is expected of a predicted one of 1 as long as nothing was measured."""
        self.points, self.limit, self.scale = points, limit, scale
        self.tried: dict[int, Tried] = {}
        # Those below do not hold, those from `_high` on do.
        self._low, self._high = -1, len(points)

    @property
    def best(self) -> int | None:
        return self._high if self._high < len(self.points) else None

    def add(self, index: int, trial: Tried) -> None:
        self.tried[index] = trial
        if trial.holds:
            self._high = min(self._high, index)
        else:
            self._low = max(self._low, index)

    def next(self) -> int | None:
        """None where the search has ended."""
        if self._high - self._low <= 1 or len(self.tried) >= _TRIALS:
            return None
        if self._is_close():
            return None
        last = len(self.points) - 1
        wanted = next((index for index in range(last + 1) if self._expected(index) <= self.limit), last)
        return min(max(self._hastened(wanted), self._low + 1), self._high - 1)

    def _hastened(self, wanted: int) -> int:
        """Where three trials on end went the same way, at least twice as far as the last step: what is expected may
        come nearer to the limit without end, as of a bound that no cost brings down to 0."""
        if len(self.tried) < 3:
            return wanted
        *_, (_, one), (before, two), (after, three) = self.tried.items()
        if not one.holds == two.holds == three.holds:
            return wanted
        far = after + 2 * (after - before)
        return min(wanted, far) if three.holds else max(wanted, far)

    def _is_close(self) -> bool:
        if self.best is None:
            return False
        below = self.points[self._low + 1].size_bytes
        return self.points[self._high].size_bytes <= (1 + _CLOSE) * below

    def _expected(self, index: int) -> float:
        """The upper bound that is to be expected: predicted loss, times what was measured over what was predicted at
        the nearest trials on both sides, with logarithms between them."""
        factors = [
            (abs(index - other), math.log(trial.upper / trial.predicted))
            for other, trial in self.tried.items()
            if trial.predicted > 0 and trial.upper > 0
        ]
        near = sorted(factors)[:2]
        if not near:
            return self.scale * self.points[index].cost
        shares = [1 / (1 + distance) for distance, _ in near]
        log = sum(share * factor for share, (_, factor) in zip(shares, near, strict=True)) / sum(shares)
        return self.points[index].cost * math.exp(log)
