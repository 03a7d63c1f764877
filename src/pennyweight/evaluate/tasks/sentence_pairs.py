"""Sentence pairs: how well the similarity of two embeddings agrees with a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.evaluate.confidence import ERRORS, Lost
from pennyweight.evaluate.tasks.base import FieldError, Outcome, Passage, TaskMetric, Tokens, text_of
from pennyweight.evaluate.tasks.spearman import spearman, spearman_difference


@dataclass(frozen=True)
class Pair:
    """An item; the larger its score, the more alike `a` and `b` are."""

    a: str
    b: str
    score: float


@dataclass(frozen=True)
class SentencePairs:
    """spearman   100 x Spearman's correlation of the scores with the cosines of the two embeddings: means of the last
    hidden states over all tokens of a sentence, special ones included"""

    name: str = "sentence-pairs"
    needs_decoder: bool = False

    @property
    def fields(self) -> Mapping[str, str]:
        return {"a": "a string", "b": "a string", "score": "a number"}

    def item(self, record: Mapping[str, Any]) -> Pair:
        score = record["score"]
        if not isinstance(score, int | float) or isinstance(score, bool) or not math.isfinite(score):
            raise FieldError(f"`score` is {score!r:.60}: give a number")
        return Pair(text_of(record, "a"), text_of(record, "b"), float(score))

    def check(self, items: Sequence[Pair]) -> None:
        if len({item.score for item in items}) == 1:
            raise FieldError(f"every `score` is {items[0].score:g}: nothing correlates with it; give different ones")

    def passages(self, item: Pair, tokens: Tokens) -> list[Passage]:
        return [tokens.sentence(item.a), tokens.sentence(item.b)]

    def read(self, output: Tensor, passage: Passage) -> Tensor:
        """The embedding, float64 [width], of length 1."""
        return torch.nn.functional.normalize(output.double().mean(0), dim=0)

    def outcome(self, item: Pair, readings: Sequence[Tensor]) -> Outcome:
        return (float(readings[0] @ readings[1]),)

    def metrics(self, items: Sequence[Pair], outcomes: Sequence[Outcome]) -> dict[str, float]:
        return {"spearman": 100 * spearman(_scores(items), _cosines(outcomes))}

    def lost(self, items: Sequence[Pair], before: Sequence[Outcome], after: Sequence[Outcome]) -> Lost:
        difference, error = spearman_difference(_scores(items), _cosines(before), _cosines(after))
        return Lost(100 * difference, 100 * error, 100 * (difference + ERRORS * error))

    def items_needed(self, points: float) -> int:
        """Cosines are no counts: what gives the same ranks has lost nothing."""
        return 1


def _scores(items: Sequence[Pair]) -> Tensor:
    return torch.tensor([item.score for item in items], dtype=torch.float64)


def _cosines(outcomes: Sequence[Outcome]) -> Tensor:
    return torch.tensor([outcome[0] for outcome in outcomes], dtype=torch.float64)


PROVIDES: tuple[TaskMetric[Pair], ...] = (SentencePairs(),)
