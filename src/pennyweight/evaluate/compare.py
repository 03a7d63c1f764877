"""A model against the original, block by block, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.core.errors import DataError, ModelError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.inference.cache import DIRECTORY as PACKED_DIRECTORY
from pennyweight.models import text
from pennyweight.models.hub import resolve
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.costs.cache import DIRECTORY
from pennyweight.pipeline.sizes import tensor_bytes, weight_count
from pennyweight.pipeline.windows import windows_of

# Rows of logits that are compared at once: bounds the memory of the float32 copies.
_ROWS = 256
# Logits of both models that are held at once, one batch at least: more batches wait for their turn.
_LOGITS_BYTES = 1 << 30


@dataclass(frozen=True)
class WindowScores:
    """Sums of one window. Of a decoder: nats of the text under both models, KL(original || this) and agreements over
    its `tokens` predicted tokens. Of an encoder: `cosine` of the two mean-pooled hidden states."""

    tokens: int
    nats: float = 0.0
    reference_nats: float = 0.0
    kl: float = 0.0
    agreements: int = 0
    cosine: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Bytes of all files of a model and of its original, and 8 x bytes of its weight tensors / weights of that."""

    size_bytes: int
    reference_size_bytes: int
    bpw: float
    reference_bpw: float

    @staticmethod
    def of(candidate: StreamedModel, reference: StreamedModel) -> Sizes:
        weights = weight_count(reference)
        return Sizes(
            size_bytes=directory_bytes(candidate.path),
            reference_size_bytes=directory_bytes(reference.path),
            bpw=round(8 * tensor_bytes(candidate) / weights, 4),
            reference_bpw=round(8 * tensor_bytes(reference) / weights, 4),
        )


@dataclass(frozen=True)
class Evaluation:
    """What was lost, on which text. All against the original, over the same tokens; standard errors are over windows.

    perplexity, reference_perplexity   exp of the mean nats a token, windows of `context` tokens, stride = context
    windows, context                   of an encoder texts, long ones in pieces, and tokens of the longest; no stride
    kl_mean, kl_stderr                 mean over tokens of KL(original || this) in nats, float32, whole vocabulary
    top1_agreement                     share of tokens whose most likely token is the same in both
    cosine_mean, cosine_stderr         of an encoder: cosine of mean-pooled embeddings
    bpw                                8 x bytes of all weight tensors / weights of the original
    """

    perplexity: float | None
    reference_perplexity: float | None
    kl_mean: float | None
    kl_stderr: float | None
    top1_agreement: float | None
    cosine_mean: float | None
    cosine_stderr: float | None
    tokens: int
    windows: int
    context: int
    stride: int | None
    size_bytes: int
    reference_size_bytes: int
    bpw: float
    reference_bpw: float


def evaluate(
    artefact: str,
    *,
    against: str,
    source: str,
    length: int = 512,
    samples: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Compare the model in `artefact` with the original `against` on the text `source`, in windows of `length` tokens;
    encoders text by text.

    Both are run block by block in float32, so neither has to fit in memory. `tell(done, total)` follows the blocks.
    Raises ModelError where the two do not belong together.
    """
    candidate, reference = (
        StreamedModel(resolve(model), trust_remote_code=trust_remote_code, device=device)
        for model in (artefact, against)
    )
    windows = evaluation_windows(reference, source, length=length, samples=samples, trust_remote_code=trust_remote_code)
    scores = Reference(reference, windows).compare(candidate, tell=tell)
    return _summary(scores, candidate, reference, windows)


def evaluation_windows(
    model: StreamedModel, source: str, *, length: int, samples: int | None, trust_remote_code: bool = False
) -> list[Tensor]:
    """Windows of the text, int64 [tokens]; the first `samples` of them, all when None."""
    windows = windows_of(model, source, length=length, trust_remote_code=trust_remote_code)
    if samples is not None and samples < 1:
        raise DataError(f"{samples} windows cannot be evaluated: give at least 1")
    return windows[:samples]


class Reference:
    """The original on `windows` of token ids [tokens]. It is run once, with the first that is compared with it, and
    what its blocks made of the windows is held: 4 x width bytes a token."""

    def __init__(self, model: StreamedModel, windows: Sequence[Tensor]) -> None:
        self.model = model
        self.windows = windows
        self._batches = text.batches(windows)
        self._stream: Stream | None = None

    def compare(
        self, candidate: StreamedModel, *, tell: Callable[[int, int], None] = lambda done, total: None
    ) -> list[WindowScores]:
        """Scores of every window, in the order of `text.batches`; they do not depend on the number of threads.
        `tell(done, total)` follows the blocks. Raises ModelError where the one cannot have been made from the other."""
        check_pair(candidate, self.model)
        blocks = len(self.model.blocks)
        before = blocks if self._stream is None else 0
        if self._stream is None:
            self._stream = self.model.run(self._batches, tell=lambda done: tell(done, 2 * blocks))
        stream = candidate.run(self._batches, tell=lambda done: tell(before + done, before + blocks))
        return self._score(candidate, stream, self._stream)

    def _score(self, candidate: StreamedModel, stream: Stream, reference: Stream) -> list[WindowScores]:
        batches = self._batches
        with candidate.finishing(stream) as ours, self.model.finishing(reference) as theirs:

            def one(batch: int) -> list[WindowScores]:
                score = score_logits if self.model.is_decoder else score_embeddings
                pairs = zip(ours(batch), theirs(batch), batches[batch].to(self.model.device), strict=True)
                return [score(this, that, ids) for this, that, ids in pairs]

            together = max(1, _LOGITS_BYTES // max(_logits_bytes(self.model, batch) for batch in batches))
            rounds = [parallel_map(one, range(len(batches))[part]) for part in chunks(len(batches), together)]
            return [window for scores in rounds for batch in scores for window in batch]


def check_pair(candidate: StreamedModel, reference: StreamedModel) -> None:
    """Raises ModelError where the one cannot have been made from the other."""
    if len(candidate.blocks) != len(reference.blocks) or candidate.config.model_type != reference.config.model_type:
        raise ModelError(
            f"{candidate.path} ({candidate.config.model_type}, {len(candidate.blocks)} blocks) is not made from "
            f"{reference.path} ({reference.config.model_type}, {len(reference.blocks)} blocks): name its original"
        )
    sizes = [model.config.get_text_config().vocab_size for model in (candidate, reference)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{candidate.path} has a vocabulary of {sizes[0]} and {reference.path} one of {sizes[1]}: name its original"
        )


def _logits_bytes(model: StreamedModel, ids: Tensor) -> int:
    """What the float32 outputs of both models for one batch take."""
    config = model.config.get_text_config()
    return 8 * ids.numel() * int(config.vocab_size if model.is_decoder else config.hidden_size)


def score_logits(logits: Tensor, reference: Tensor, ids: Tensor) -> WindowScores:
    """Scores of one window from logits [tokens, vocabulary] of both models and its token ids [tokens]."""
    nats = reference_nats = kl = 0.0
    agreements = 0
    for start in range(0, ids.shape[0] - 1, _ROWS):
        rows = slice(start, min(start + _ROWS, ids.shape[0] - 1))
        q = logits[rows].float().log_softmax(-1)
        p = reference[rows].float().log_softmax(-1)
        target = ids[rows.start + 1 : rows.stop + 1, None]
        nats -= float(q.gather(1, target).double().sum())
        reference_nats -= float(p.gather(1, target).double().sum())
        agreements += int((q.argmax(-1) == p.argmax(-1)).sum())
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
    return WindowScores(ids.shape[0] - 1, nats, reference_nats, kl, agreements)


def score_embeddings(hidden: Tensor, reference: Tensor, ids: Tensor) -> WindowScores:
    """The cosine of the mean-pooled hidden states [tokens, width] of one window."""
    cosine = torch.nn.functional.cosine_similarity(hidden.double().mean(0), reference.double().mean(0), dim=0)
    return WindowScores(ids.shape[0], cosine=float(cosine))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is infinite."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def _summary(
    scores: Sequence[WindowScores], candidate: StreamedModel, reference: StreamedModel, windows: Sequence[Tensor]
) -> Evaluation:
    tokens = sum(score.tokens for score in scores)
    context = max(map(len, windows))
    is_decoder = reference.is_decoder
    kl, kl_error = mean_and_error([score.kl / score.tokens for score in scores])
    cosine, cosine_error = mean_and_error([score.cosine for score in scores])
    return Evaluation(
        perplexity=_exp(sum(score.nats for score in scores) / tokens) if is_decoder else None,
        reference_perplexity=_exp(sum(score.reference_nats for score in scores) / tokens) if is_decoder else None,
        kl_mean=kl if is_decoder else None,
        kl_stderr=kl_error if is_decoder else None,
        top1_agreement=sum(score.agreements for score in scores) / tokens if is_decoder else None,
        cosine_mean=None if is_decoder else cosine,
        cosine_stderr=None if is_decoder else cosine_error,
        tokens=tokens,
        windows=len(scores),
        context=context,
        stride=context if is_decoder else None,
        **asdict(Sizes.of(candidate, reference)),
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def directory_bytes(path: Path) -> int:
    """Bytes of a model's files; what is only kept beside them is none of it."""
    beside = {DIRECTORY, PACKED_DIRECTORY}
    files = (file for file in path.rglob("*") if file.is_file() and beside.isdisjoint(file.relative_to(path).parts))
    return sum(file.stat().st_size for file in files)
