"""Spearman's correlation, and how sure the difference of two of them on the same pairs is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks

# Left-out items that are looked at together: bounds the memory of their ranks.
_TOGETHER = 256


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64 [items]; equal values share the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean: Tensor = last - (counts.double() - 1) / 2
    return mean[place]


def spearman(one: Tensor, other: Tensor) -> float:
    """Pearson's correlation of the ranks of two float64 [items]; 0 where all of one are equal."""
    return float(_correlation(ranks(one)[None], ranks(other)[None])[0])


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Of the rows of two [rows, items]."""
    a, b = (rows - rows.mean(1, keepdim=True) for rows in (one, other))
    length = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(length > 0, (a * b).sum(1) / length.clamp_min(1e-300), 0.0)


def spearman_difference(gold: Tensor, before: Tensor, after: Tensor) -> tuple[float, float]:
    """spearman(gold, before) - spearman(gold, after) of float64 [items], and its standard error by the jackknife,

        sqrt((n - 1) / n  sum over i of (d_i - mean d)²),    d_i: the difference without item i

    (Efron, "The Jackknife, the Bootstrap and Other Resampling Plans", 1982, chapter 3).
    """
    count = len(gold)
    without: list[Tensor] = []
    for part in chunks(count, _TOGETHER):
        left_out = torch.arange(count)[part]
        reference = _ranks_without(gold, left_out)
        without.append(
            _correlation(reference, _ranks_without(before, left_out))
            - _correlation(reference, _ranks_without(after, left_out))
        )
    d = torch.cat(without)
    error = math.sqrt((count - 1) / count * float((d - d.mean()).square().sum()))
    return spearman(gold, before) - spearman(gold, after), error


def _ranks_without(values: Tensor, left_out: Tensor) -> Tensor:
    """Ranks [rows, items - 1] of the others without each of the items `left_out`: one less for what is above it, half
    of one for what is equal to it."""
    out = values[left_out, None]
    moved = ranks(values)[None] - (out < values).double() - (out == values).double() / 2
    others = torch.arange(len(values))[None] != left_out[:, None]
    return moved[others].reshape(len(left_out), -1)
