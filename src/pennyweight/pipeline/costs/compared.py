"""How far what changed models give is from what the original gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.losses import distance, kl

# Tokens whose logits a thread holds at once: a vocabulary is large.
_TOKENS = 128

# Given the logits [tokens, vocabulary] of the original and of another model: the sum of its losses.
Loss = Callable[[Tensor, Tensor], float]


def compared(
    model: StreamedModel,
    original: Stream,
    streams: Sequence[Stream],
    *,
    given: Mapping[str, Tensor] = MappingProxyType({}),
    loss: Loss = kl,
) -> list[float]:
    """The mean loss over the tokens of each of `streams`, finished with `given` in place of parameters by name, against
    `original`, finished as it is. They hold what the last block gave; an encoder has its own loss."""
    parts = [
        _part(stream, batch, cut)
        for batch, ids in enumerate(original.input_ids)
        for cut in _cuts(model, ids)
        for stream in (original, *streams)
    ]
    together = Stream([ids for ids, _ in parts], [hidden for _, hidden in parts], [])
    each = 1 + len(streams)
    loss = loss if model.is_decoder else _distance

    def given_to(part: int) -> Mapping[str, Tensor]:
        return given if part % each else {}

    with model.finishing(together, given=given_to) as finish:

        def one(first: int) -> list[float]:
            reference = finish(first).flatten(0, 1)
            return [loss(reference, finish(first + n).flatten(0, 1)) for n in range(1, each)]

        sums = parallel_map(one, range(0, len(parts), each))
    tokens = sum(ids.numel() for ids in original.input_ids)
    # Rounding may take a divergence of almost nothing below it.
    return [max(0.0, math.fsum(losses) / tokens) for losses in zip(*sums, strict=True)]


def _cuts(model: StreamedModel, ids: Tensor) -> list[tuple[slice, slice]]:
    """The windows and tokens of each part of a batch. Behind the blocks of a decoder a token is by itself; an encoder's
    loss is that of a window."""
    windows, tokens = ids.shape
    if not model.is_decoder:
        return [(window, slice(None)) for window in chunks(windows, 1)]
    return [(slice(None), part) for part in chunks(tokens, max(1, _TOKENS // windows))]


def _part(stream: Stream, batch: int, cut: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
    return stream.input_ids[batch][cut], stream.hidden[batch][cut]


def _distance(reference: Tensor, output: Tensor) -> float:
    return float(distance(output, reference))
