"""Groups to allocate, written as tables of sizes and costs, and the best cost found by trying everything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pennyweight.plan.choices import Choice, Group

Table = Sequence[Sequence[tuple[int, float]]]


def groups_of(table: Table) -> list[Group]:
    """One group a row, its choices as (bytes, cost)."""
    return [
        Group((f"site.{row}",), tuple(Choice(None, size, cost) for size, cost in choices))
        for row, choices in enumerate(table)
    ]


def from_arrays(size: npt.NDArray[np.int64], cost: npt.NDArray[np.float64]) -> list[Group]:
    """size, cost: [groups, choices]."""
    return groups_of([list(zip(*row, strict=True)) for row in zip(size.tolist(), cost.tolist(), strict=True)])


def least_cost(groups: Sequence[Group], size_bytes: int) -> float:
    """Of all combinations that fit the least cost, in float64."""
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    for group in groups:
        size = (size[:, None] + np.array([choice.size_bytes for choice in group.choices])).ravel()
        cost = (cost[:, None] + np.array([choice.cost for choice in group.choices])).ravel()
    return float(cost[size <= size_bytes].min())


def mixture_of_experts(groups: int, choices: int, *, same_size: bool = False) -> list[Group]:
    """Groups of very different sensitivity whose cost falls by 4 a bit, a third up or down by chance."""
    rng = np.random.default_rng(0)
    bits = np.array([2.125, 2.25, 2.5, 3.125, 3.25, 3.5, 4.125, 4.25, 4.5, 6.25, 8.25, 16])[:choices]
    weights = np.full(groups, 2048 * 768) if same_size else rng.integers(1_000, 10_000_000, groups)
    cost = rng.lognormal(0, 2, (groups, 1)) * 4.0**-bits * np.exp(0.3 * rng.standard_normal((groups, choices)))
    return from_arrays((weights[:, None] * bits / 8).astype(np.int64), cost)
