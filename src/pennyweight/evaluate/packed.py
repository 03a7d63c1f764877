"""What computing with packed weights changes: logits of the loaded model against those of the decoded one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from pennyweight.evaluate.compare import evaluation_windows, score_logits
from pennyweight.inference.load import load
from pennyweight.kernels.packed import Activations
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel


@dataclass(frozen=True)
class PackedLoss:
    """Over `tokens` predicted tokens: the mean of KL(decoded || packed) in nats, the share of tokens whose most likely
    one is the same, and exp of the mean nats a token of both."""

    tokens: int
    kl: float
    agreement: float
    perplexity: float
    decoded_perplexity: float


def packed_loss(
    artefact: str | Path,
    *,
    source: str,
    activations: Activations,
    dtype: torch.dtype | None = None,
    length: int = 512,
    samples: int | None = None,
    cache: bool = True,
) -> PackedLoss:
    """The model of `artefact` as `pennyweight.load` gives it, on windows of the text `source`, against the model of the
    weights that its runtime decodes, computed in float32."""
    reference = StreamedModel(Path(artefact))
    windows = evaluation_windows(reference, source, length=length, samples=samples)
    model = load(artefact, activations=activations, dtype=dtype, cache=cache)
    batches = text.batches(windows)
    states = reference.start(batches)
    for index in range(len(reference.blocks)):
        with reference.opened(index) as block:
            reference.advance(block, index, states)
    with torch.no_grad(), reference.finishing(states) as finish:
        scores = [
            score_logits(ours, theirs, ids)
            for batch, given in enumerate(batches)
            for ours, theirs, ids in zip(model(input_ids=given).logits, finish(batch), given, strict=True)
        ]
    tokens = sum(score.tokens for score in scores)
    return PackedLoss(
        tokens=tokens,
        kl=math.fsum(score.kl for score in scores) / tokens,
        agreement=sum(score.agreements for score in scores) / tokens,
        perplexity=math.exp(math.fsum(score.nats for score in scores) / tokens),
        decoded_perplexity=math.exp(math.fsum(score.reference_nats for score in scores) / tokens),
    )
