"""Accuracies of the same items before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pennyweight.evaluate.compare import mean_and_error
from pennyweight.evaluate.confidence import Lost, items_for, paired_bound
from pennyweight.evaluate.tasks.base import Outcome


def accuracy(outcomes: Sequence[Outcome], index: int = 0) -> float:
    """Per cent of items whose number `index` is 1."""
    return 100 * math.fsum(outcome[index] for outcome in outcomes) / len(outcomes)


def accuracy_lost(before: Sequence[Outcome], after: Sequence[Outcome]) -> Lost:
    """Of the first number: the mean of the paired differences with its standard error, and Tango's bound, which holds
    where few items differ too."""
    differences = [one[0] - other[0] for one, other in zip(before, after, strict=True)]
    mean, error = mean_and_error(differences)
    bound = paired_bound(differences.count(1.0), differences.count(-1.0), len(differences))
    return Lost(100 * mean, 100 * error, 100 * bound)


def accuracy_items(points: float) -> int:
    """How many items, all of them as before, show that no more points are lost."""
    return items_for(min(points, 100.0) / 100)
