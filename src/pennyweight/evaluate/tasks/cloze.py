"""Cloze: the target is what greedy decoding continues the context with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.evaluate.confidence import Lost
from pennyweight.evaluate.tasks.accuracy import accuracy, accuracy_items, accuracy_lost
from pennyweight.evaluate.tasks.base import Outcome, Passage, TaskMetric, Tokens, text_of


@dataclass(frozen=True)
class Blank:
    """An item."""

    context: str
    target: str


@dataclass(frozen=True)
class Cloze:
    """accuracy   per cent of items of whose target every token is the most likely one after those before it"""

    name: str = "cloze"
    needs_decoder: bool = True

    @property
    def fields(self) -> Mapping[str, str]:
        return {"context": "a string", "target": "a string"}

    def item(self, record: Mapping[str, Any]) -> Blank:
        return Blank(text_of(record, "context", may_be_empty=True), text_of(record, "target"))

    def check(self, items: Sequence[Blank]) -> None:
        pass

    def passages(self, item: Blank, tokens: Tokens) -> list[Passage]:
        return tokens.continued(item.context, [item.target])

    def read(self, output: Tensor, passage: Passage) -> Tensor:
        """Whether greedy decoding gives the tokens that count."""
        likely = output[passage.first - 1 : len(passage.ids) - 1].argmax(-1)
        return (likely == torch.tensor(passage.ids[passage.first :], device=output.device)).all()

    def outcome(self, item: Blank, readings: Sequence[Tensor]) -> Outcome:
        return (float(readings[0]),)

    def metrics(self, items: Sequence[Blank], outcomes: Sequence[Outcome]) -> dict[str, float]:
        return {"accuracy": accuracy(outcomes)}

    def lost(self, items: Sequence[Blank], before: Sequence[Outcome], after: Sequence[Outcome]) -> Lost:
        return accuracy_lost(before, after)

    def items_needed(self, points: float) -> int:
        return accuracy_items(points)


PROVIDES: tuple[TaskMetric[Blank], ...] = (Cloze(),)
