"""What every kind of task is: items in, a metric in points out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from pennyweight.evaluate.confidence import Lost
from pennyweight.models.text import Prefixes

Item = TypeVar("Item")
# What a metric is made of, of one item; the first number is what its headline is made of.
Outcome = tuple[float, ...]


class FieldError(ValueError):
    """A field of an item is not what it must be; the text says what was given and what is allowed."""


@dataclass(frozen=True)
class Passage:
    """Token ids that the model is given; the first `first` of them are there for those after them, which count."""

    ids: tuple[int, ...]
    first: int = 0


@dataclass(frozen=True)
class Tokens:
    """A tokenizer, and the special tokens that it puts around a text."""

    tokenizer: Any
    special: Prefixes

    def sentence(self, text: str) -> Passage:
        """All of `text` between its special tokens."""
        return Passage((*self.special.before, *self._bare(text), *self.special.after))

    def continued(self, context: str, endings: Sequence[str]) -> list[Passage]:
        """Context and ending in one text, for each of the `endings`. All count from the same token on: where the first
        of them departs from the tokens of the context alone, whose last may be another before an ending.

        Raises FieldError where nothing is before that."""
        whole = [self._bare(context + ending) for ending in endings]
        if not all(whole):
            raise FieldError("what follows `context` is no token: give more of it")
        first = min(_common(self._bare(context), ids[:-1]) for ids in whole)
        before = self.special.before
        # A chat template writes BOS into the text.
        before = [] if before and whole[0][: len(before)] == before else before
        if not before and first == 0:
            raise FieldError("`context` is no token that anything could follow: give a longer one")
        return [Passage((*before, *ids), len(before) + first) for ids in whole]

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, padding=False, truncation=False, verbose=False)
                    ["input_ids"])  # fmt: skip


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class TaskMetric(Protocol[Item]):
    """A kind of task.

    name            of the kind
    fields          what an item's line must have, and what each holds; no other kind has all of them
    needs_decoder   items are read from logits; else from the last hidden states of an encoder
    """

    @property
    def name(self) -> str: ...
    @property
    def fields(self) -> Mapping[str, str]: ...
    @property
    def needs_decoder(self) -> bool: ...

    def item(self, record: Mapping[str, Any]) -> Item:
        """An item from the `fields` of its line; raises FieldError."""
        ...

    def check(self, items: Sequence[Item]) -> None:
        """Raises FieldError where all items together have no metric."""
        ...

    def passages(self, item: Item, tokens: Tokens) -> list[Passage]:
        """What the model is given for an item; raises FieldError."""
        ...

    def read(self, output: Tensor, passage: Passage) -> Tensor:
        """What is kept of its output [tokens, vocabulary or width] for a passage."""
        ...

    def outcome(self, item: Item, readings: Sequence[Tensor]) -> Outcome:
        """What the item adds to the metric, from what was read of its passages."""
        ...

    def metrics(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> dict[str, float]:
        """By name, in points; first the one that a budget is of."""
        ...

    def lost(self, items: Sequence[Item], before: Sequence[Outcome], after: Sequence[Outcome]) -> Lost:
        """Of the first metric, between two models on the same items."""
        ...

    def items_needed(self, points: float) -> int:
        """How many items a model needs that answers all as the original does, to show that it loses no more."""
        ...


def text_of(record: Mapping[str, Any], field: str, *, may_be_empty: bool = False) -> str:
    """A field that is a string; raises FieldError."""
    value = record[field]
    if not isinstance(value, str) or not (value or may_be_empty):
        raise FieldError(f"`{field}` is {value!r:.60}: give a string{'' if may_be_empty else ' that is not empty'}")
    return value
