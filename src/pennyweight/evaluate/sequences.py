"""What a model gives for token sequences of any length, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel

Read = TypeVar("Read")

# Hidden states that are held at once: more sequences take another round, which reads the model again.
_STATES_BYTES = 1 << 30
# Outputs (logits) that are held at once, one batch at least.
_OUTPUT_BYTES = 1 << 30


@dataclass(frozen=True)
class _Batch:
    """Sequences of equal length, ids [sequences, tokens]; members: which they are."""

    members: Sequence[int]
    ids: Tensor


def each_output(
    model: StreamedModel, sequences: Sequence[Sequence[int]], read: Callable[[Tensor, int], Read]
) -> list[Read]:
    """`read(output, index)` of every sequence of token ids, in order. output: float32 logits [tokens, vocabulary] of a
    decoder, the last hidden state [tokens, width] of an encoder.

    Sequences of equal length run together, so nothing is padded and nothing masked. `read` may be called from several
    threads.
    """
    config = model.config.get_text_config()
    found: dict[int, Read] = {}
    for batches in _cut(_batches(sequences), 4 * int(config.hidden_size), _STATES_BYTES):
        stream = model.start([batch.ids for batch in batches])
        for index in range(len(model.blocks)):
            with model.opened(index) as block:
                model.advance(block, index, stream)
        with model.finishing(stream) as finish:

            def one(number: int, batches: Sequence[_Batch] = batches, finish: Callable[[int], Tensor] = finish) -> None:
                for output, member in zip(finish(number), batches[number].members, strict=True):
                    found[member] = read(output.float(), member)

            width = int(config.vocab_size if model.is_decoder else config.hidden_size)
            together = max(1, _OUTPUT_BYTES // (4 * width * max(batch.ids.numel() for batch in batches)))
            for part in chunks(len(batches), together):
                parallel_map(one, range(len(batches))[part])
    return [found[index] for index in range(len(sequences))]


def _batches(sequences: Sequence[Sequence[int]]) -> list[_Batch]:
    """From short to long; the cut depends on nothing but the lengths."""
    members = iter(sorted(range(len(sequences)), key=lambda index: len(sequences[index])))
    batches = text.batches(torch.tensor(list(ids)) for ids in sequences)
    return [_Batch(list(islice(members, len(ids))), ids) for ids in batches]


def _cut(batches: Sequence[_Batch], token_bytes: int, most_bytes: int) -> list[list[_Batch]]:
    """Rounds of batches whose hidden states, so many bytes a token, are no more than that, or one batch."""
    rounds: list[list[_Batch]] = []
    room = 0
    for batch in batches:
        needed = token_bytes * batch.ids.numel()
        if needed > room or not rounds:
            rounds.append([])
            room = most_bytes
        rounds[-1].append(batch)
        room -= needed
    return rounds
