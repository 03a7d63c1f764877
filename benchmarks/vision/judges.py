"""How outputs are judged: a figure in percent, and for pictures a hit or a miss of each, so that two can be paired."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Score:
    """figure   in percent
    hits     bool [n], of which the figure is the mean; None where it is no mean
    other    what is shown beside it
    """

    figure: float
    hits: NDArray[np.bool_] | None = None
    other: Mapping[str, float] = field(default_factory=dict)


class Judge(Protocol):
    """What the figure is called, and how outputs [n, width] get it, those of the float network beside them."""

    @property
    def figure(self) -> str: ...

    def score(self, outputs: Floats, of_float: Floats) -> Score: ...


@dataclass(frozen=True)
class Top1:
    """The share of pictures whose largest logit is that of their label."""

    labels: NDArray[np.int64]
    figure: str = "top-1"

    def score(self, outputs: Floats, of_float: Floats) -> Score:
        other = {"agreement": 100 * float(_agree(outputs, of_float).mean()), "KL": divergence(of_float, outputs)}
        return _mean(outputs.argmax(1) == self.labels, other)


@dataclass(frozen=True)
class Agreement:
    """The share of pictures of which the largest logit is where the float network's is."""

    labels: NDArray[np.int64]
    figure: str = "agreement"

    def score(self, outputs: Floats, of_float: Floats) -> Score:
        other = {"top-1": 100 * float((outputs.argmax(1) == self.labels).mean()), "KL": divergence(of_float, outputs)}
        return _mean(_agree(outputs, of_float), other)


@dataclass(frozen=True)
class Spearman:
    """100 x Spearman's correlation of the cosines of sentence pairs with human scores; outputs are unit vectors.

    pairs    int64 [pairs, 2], places of the sentences
    scores   float64 [pairs]
    """

    pairs: NDArray[np.int64]
    scores: NDArray[np.float64]
    figure: str = "Spearman"

    def score(self, outputs: Floats, of_float: Floats) -> Score:
        from scipy.stats import spearmanr

        wide, wide_float = outputs.astype(np.float64), of_float.astype(np.float64)
        cosines = (wide[self.pairs[:, 0]] * wide[self.pairs[:, 1]]).sum(1)
        other = {"1 - cosine": 1 - float((wide * wide_float).sum(1).mean())}
        return Score(100 * float(spearmanr(cosines, self.scores).statistic), None, other)


def paired(one: Score, other: Score) -> tuple[float, float | None]:
    """one - other in points, and the standard error of that over the same pictures."""
    difference = one.figure - other.figure
    if one.hits is None or other.hits is None:
        return difference, None
    each = one.hits.astype(np.float64) - other.hits
    return difference, 100 * float(each.std(ddof=1)) / math.sqrt(len(each))


def divergence(reference: Floats, outputs: Floats) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(outputs)) in nats, float64."""
    p, q = _log_softmax(reference), _log_softmax(outputs)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    made: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return made


def _agree(outputs: Floats, of_float: Floats) -> NDArray[np.bool_]:
    made: NDArray[np.bool_] = outputs.argmax(1) == of_float.argmax(1)
    return made


def _mean(hits: NDArray[np.bool_], other: Mapping[str, float]) -> Score:
    return Score(100 * float(hits.mean()), hits, other)
