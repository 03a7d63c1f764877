"""Multiple choice: the answer is the choice that the model gives the most probability after the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.evaluate.confidence import Lost
from pennyweight.evaluate.tasks.accuracy import accuracy, accuracy_items, accuracy_lost
from pennyweight.evaluate.tasks.base import FieldError, Outcome, Passage, TaskMetric, Tokens, text_of


@dataclass(frozen=True)
class Choices:
    """An item; `answer` is the index of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MultipleChoice:
    """accuracy             per cent of items whose answer has the largest log p(choice | context), summed over tokens
    accuracy_normalised  the same with log p over the number of characters of the choice

    Of equal choices the first is taken."""

    name: str = "multiple-choice"
    needs_decoder: bool = True

    @property
    def fields(self) -> Mapping[str, str]:
        return {"context": "a string", "choices": "a list of strings", "answer": "the index of the right one, from 0"}

    def item(self, record: Mapping[str, Any]) -> Choices:
        choices, answer = record["choices"], record["answer"]
        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(one, str) and one for one in choices)
        ):
            raise FieldError(f"`choices` is {choices!r:.60}: give a list of two or more strings that are not empty")
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise FieldError(f"`answer` is {answer!r:.60}: give the index of the right choice, 0 to {len(choices) - 1}")
        return Choices(text_of(record, "context", may_be_empty=True), tuple(choices), answer)

    def check(self, items: Sequence[Choices]) -> None:
        pass

    def passages(self, item: Choices, tokens: Tokens) -> list[Passage]:
        return tokens.continued(item.context, item.choices)

    def read(self, output: Tensor, passage: Passage) -> Tensor:
        """log p of the tokens that count, float32 log-softmax, summed in float64."""
        rows = output[passage.first - 1 : len(passage.ids) - 1].log_softmax(-1)
        ids = torch.tensor(passage.ids[passage.first :], device=output.device)
        return rows.gather(1, ids[:, None]).double().sum()

    def outcome(self, item: Choices, readings: Sequence[Tensor]) -> Outcome:
        log_p = torch.stack([reading.cpu() for reading in readings])
        lengths = torch.tensor([len(choice) for choice in item.choices])
        return float(int(log_p.argmax()) == item.answer), float(int((log_p / lengths).argmax()) == item.answer)

    def metrics(self, items: Sequence[Choices], outcomes: Sequence[Outcome]) -> dict[str, float]:
        return {"accuracy": accuracy(outcomes), "accuracy_normalised": accuracy(outcomes, 1)}

    def lost(self, items: Sequence[Choices], before: Sequence[Outcome], after: Sequence[Outcome]) -> Lost:
        return accuracy_lost(before, after)

    def items_needed(self, points: float) -> int:
        return accuracy_items(points)


PROVIDES: tuple[TaskMetric[Choices], ...] = (MultipleChoice(),)
