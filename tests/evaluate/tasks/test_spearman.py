"""Spearman's correlation against scipy's, and the error of a difference against leaving out one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from pennyweight.evaluate.confidence import ERRORS
from pennyweight.evaluate.tasks import spearman as module
from pennyweight.evaluate.tasks.spearman import ranks, spearman, spearman_difference


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30))
def test_ranks_share_the_mean_of_ties(values: list[int]) -> None:
    assert ranks(torch.tensor(values).double()).tolist() == rankdata(values).tolist()


def _columns(items: int, *, noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in steps, what resembles them, and that again with noise."""
    normal = torch.randn(3, items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gold = (2 * normal[0]).round()
    before = normal[0] + 0.7 * normal[1]
    return gold, before, before + noise * normal[2]


def test_the_difference_and_its_error_are_those_of_leaving_out_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOGETHER", 7)
    gold, before, after = _columns(40, noise=0.5, seed=1)
    after = (3 * after).round()

    def difference(kept: list[int]) -> float:
        return float(spearmanr(gold[kept], before[kept]).statistic - spearmanr(gold[kept], after[kept]).statistic)

    everyone = list(range(40))
    without = [difference([other for other in everyone if other != item]) for item in everyone]
    mean = sum(without) / 40
    error = math.sqrt(39 / 40 * sum((one - mean) ** 2 for one in without))
    assert spearman_difference(gold, before, after) == pytest.approx((difference(everyone), error), rel=1e-9)


def test_what_is_all_equal_correlates_with_nothing() -> None:
    assert spearman(torch.ones(5).double(), torch.arange(5).double()) == 0.0


@pytest.mark.parametrize(("items", "noise", "most"), [(40, 0.1, 0.015), (150, 0.1, 0.015), (150, 0.6, 0.045)])
def test_99_of_100_bounds_of_a_small_loss_are_above_it(items: int, noise: float, most: float) -> None:
    """0.3 points are lost, or 8.6: that much is no small change of the ranks any more, and 97 % is what is left."""
    gold, before, after = _columns(200_000, noise=noise, seed=0)
    true = spearman(gold, before) - spearman(gold, after)
    count = 200
    missed = 0
    for seed in range(count):
        difference, error = spearman_difference(*_columns(items, noise=noise, seed=seed + 1))
        missed += difference + ERRORS * error < true
    assert missed / count <= most
