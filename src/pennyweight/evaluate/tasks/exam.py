"""A task put to models: what each of them gives for every item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.errors import DataError, ModelError
from pennyweight.evaluate.sequences import each_output
from pennyweight.evaluate.tasks.base import FieldError, Outcome, Passage, Tokens
from pennyweight.evaluate.tasks.file import Task
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel


@dataclass(frozen=True)
class Exam:
    """A task in the tokens of one model. passages: of each item; distinct: those that are run, each once."""

    task: Task
    passages: Sequence[Sequence[Passage]]
    distinct: Sequence[Passage]

    @staticmethod
    def of(task: Task, model: StreamedModel) -> Exam:
        """Raises ModelError where the model cannot be asked this, DataError for an item that it does not take."""
        metric, kind = task.metric, type(model.module).__name__
        if metric.needs_decoder and not model.is_decoder:
            raise ModelError(f"{task.path} is {metric.name}, and {kind} predicts no tokens: give sentence-pairs")
        if not metric.needs_decoder and model.is_decoder:
            raise ModelError(
                f"{task.path} is {metric.name}, and {kind} is no encoder: give multiple-choice or cloze items"
            )
        tokenizer = text.load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
        tokens = Tokens(tokenizer, text.special_tokens(tokenizer))
        limit = text.context_length(model.config, model.module)
        passages: list[list[Passage]] = []
        for line, item in zip(task.lines, task.items, strict=True):
            try:
                found = metric.passages(item, tokens)
            except FieldError as error:
                raise DataError(f"{task.path}, line {line}: {error}") from error
            longest = max(len(passage.ids) for passage in found)
            if limit is not None and longest > limit:
                raise DataError(
                    f"{task.path}, line {line}: {longest} tokens, and {model.path} takes {limit}: shorten it, or leave "
                    "it out"
                )
            passages.append(found)
        distinct = list(dict.fromkeys(passage for found in passages for passage in found))
        text.check_vocabulary(torch.tensor([max(passage.ids) for passage in distinct]), model.config, [str(model.path)])
        return Exam(task, passages, distinct)

    def outcomes(self, model: StreamedModel) -> list[Outcome]:
        """Of every item, in order; they do not depend on the number of threads."""
        metric = self.task.metric

        def read(output: Tensor, index: int) -> Tensor:
            return metric.read(output, self.distinct[index]).cpu()

        found = each_output(model, [passage.ids for passage in self.distinct], read)
        readings = dict(zip(self.distinct, found, strict=True))
        return [
            metric.outcome(item, [readings[passage] for passage in passages])
            for item, passages in zip(self.task.items, self.passages, strict=True)
        ]

    def metrics(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """By name, in points; first the one that a budget is of."""
        return self.task.metric.metrics(self.task.items, outcomes)
