"""How far a quantized model is from its original, window by window, so that two of them can be compared in pairs."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.dense import stored_bytes
from pennyweight.evaluate.compare import Reference, evaluation_windows, mean_and_error
from pennyweight.evaluate.sequences import each_output
from pennyweight.evaluate.tasks.base import Passage, Tokens
from pennyweight.evaluate.tasks.sentence_pairs import SentencePairs
from pennyweight.evaluate.tasks.spearman import spearman
from pennyweight.models import text
from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.sizes import weight_count


@dataclass(frozen=True)
class Sizes:
    """bpw        8 x bytes of all tensors / weights of the original
    bpw_sites  the same of the quantized weights alone, scales and zero points included
    """

    bpw: float
    bpw_sites: float


@dataclass(frozen=True)
class Score:
    """losses      one number a window (KL in nats a token) or a sentence (1 - cosine)
    other       what is shown beside them: perplexity, top1 or spearman
    """

    losses: Sequence[float]
    other: dict[str, float]
    sizes: Sizes

    @property
    def mean_and_error(self) -> tuple[float, float]:
        return mean_and_error(self.losses)


class Judge(Protocol):
    loss: str
    unit: str
    reference: dict[str, float]

    def score(self, artefact: Path) -> Score: ...


def paired(one: Score, other: Score, *, factor: float = 1.0) -> tuple[float, float]:
    """Mean of the differences one - factor * other over the same windows, and its standard error."""
    return mean_and_error([a - factor * b for a, b in zip(one.losses, other.losses, strict=True)])


class DecoderJudge:
    """KL(original || artefact) a window of text, with perplexity and top-1 agreement beside it."""

    loss = "KL"
    unit = "windows"

    def __init__(self, model: Path, source: Path, *, length: int, samples: int | None) -> None:
        self._model = StreamedModel(model)
        self.windows = evaluation_windows(self._model, str(source), length=length, samples=samples)
        self._original = Reference(self._model, self.windows)
        self.reference = {"perplexity": math.nan}

    def score(self, artefact: Path) -> Score:
        candidate = StreamedModel(artefact)
        scores = self._original.compare(candidate)
        tokens = sum(score.tokens for score in scores)
        self.reference["perplexity"] = math.exp(math.fsum(score.reference_nats for score in scores) / tokens)
        nats = math.fsum(score.nats for score in scores) / tokens
        other = {
            "perplexity": math.exp(min(nats, 700.0)),
            "top1": sum(score.agreements for score in scores) / tokens,
        }
        return Score([score.kl / score.tokens for score in scores], other, measure_sizes(candidate, self._model))


class SentenceJudge:
    """1 - cosine of each sentence's embedding with the original's, and Spearman's correlation with the human scores.

    The embedding is the mean of the last hidden states over the sentence's tokens, special tokens included, normalised;
    sentences of the same length run together, so there is no padding and nothing to mask.
    """

    loss = "1 - cosine"
    unit = "sentences"

    def __init__(self, model: Path, pairs: Path, *, samples: int | None) -> None:
        self._model = StreamedModel(model)
        rows = read_pairs(pairs)[:samples]
        self._gold = torch.tensor([score for _, _, score in rows], dtype=torch.float64)
        self.sentences, places = numbered(rows)
        self._left, self._right = torch.tensor(places).T
        tokenizer = text.load_tokenizer(model)
        tokens = Tokens(tokenizer, text.special_tokens(tokenizer))
        self._ids = [tokens.sentence(sentence).ids for sentence in self.sentences]
        self._embeddings = self._embed(self._model)
        self.reference = {"spearman": self._spearman(self._embeddings)}

    def score(self, artefact: Path) -> Score:
        candidate = StreamedModel(artefact)
        embeddings = self._embed(candidate)
        losses = 1 - (embeddings * self._embeddings).sum(1)
        return Score(losses.tolist(), {"spearman": self._spearman(embeddings)}, measure_sizes(candidate, self._model))

    def _embed(self, model: StreamedModel) -> Tensor:
        """Unit vectors float64 [sentences, width]."""
        metric = SentencePairs()
        return torch.stack(each_output(model, self._ids, lambda output, index: metric.read(output, Passage(()))))

    def _spearman(self, embeddings: Tensor) -> float:
        cosines = (embeddings[self._left] * embeddings[self._right]).sum(1)
        return spearman(cosines, self._gold)


def read_pairs(path: Path) -> list[tuple[str, str, float]]:
    """Rows of an STS file: sentence, sentence, score."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(left, right, float(score)) for left, right, score in csv.reader(file)]


def numbered(rows: Sequence[tuple[str, str, float]]) -> tuple[list[str], list[tuple[int, int]]]:
    """The distinct sentences of `rows`, and of each row the places of its two among them."""
    sentences = list(dict.fromkeys(sentence for row in rows for sentence in row[:2]))
    place = {sentence: index for index, sentence in enumerate(sentences)}
    return sentences, [(place[left], place[right]) for left, right, _ in rows]


def measure_sizes(candidate: StreamedModel, reference: StreamedModel) -> Sizes:
    """Sizes of an artefact, packed or dense; a dense one says itself what its weights would take packed."""
    held, original = open_checkpoint(candidate.path).tensors, reference.checkpoint.tensors
    stored = stored_bytes(candidate.path)
    sizes = {name: stored.get(name, info.size_bytes) for name, info in held.items()}
    of_sites = sum(size for name, size in sizes.items() if name in stored or name not in original)
    replaced = [info.shape for name, info in original.items() if name in stored or name not in held]
    weights_of_sites = sum(math.prod(shape) for shape in replaced if len(shape) > 1)
    return Sizes(8 * sum(sizes.values()) / weight_count(reference), 8 * of_sites / max(1, weights_of_sites))
