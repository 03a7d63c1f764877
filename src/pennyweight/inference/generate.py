"""Text by a loaded model, token by token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.inference.decoder import CACHES, Decoder, DecoderParts, decoder_parts


def stream(
    model: Any, ids: Tensor, *, max_tokens: int, temperature: float, generator: torch.Generator | None = None
) -> Iterator[int]:
    """The tokens that continue `ids` [1, tokens], one after the other, the one that ends the text too.

    With temperature 0 the most likely one each time, else drawn by `generator` (torch's own by default) from the
    softmax of logits / temperature. Nothing else of generation_config.json is heeded than the tokens that end a text.
    """
    parts, ends = decoder_parts(model), _ends(model)
    logits = _by_decoder(parts, ids, max_tokens) if parts.why_not is None else _by_model(model)
    given: Sequence[int] = ids[0].tolist()
    for _ in range(max_tokens):
        # Between two operations on several threads OpenMP's helpers spin, and take the cores from those of a product.
        with one_thread_per_operation():
            token = int(_chosen(logits(given), temperature, generator))
        yield token
        if token in ends:
            return
        given = [token]


# Logits [1, vocabulary] after tokens that follow those of the calls before.
Logits = Callable[[Sequence[int]], Tensor]


def _by_decoder(parts: DecoderParts, ids: Tensor, max_tokens: int) -> Logits:
    decoder = Decoder(parts, positions=ids.shape[1] + max_tokens)
    return lambda given: decoder.logits(given)[None]


def _by_model(model: Any) -> Logits:
    """Through the forward pass of the model; without a cache of its own it is given the whole text each time."""
    accepted = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    cache = next((name for name in CACHES if name in accepted), CACHES[-1])
    text: list[int] = []
    past: Any = None

    def logits(given: Sequence[int]) -> Tensor:
        nonlocal past
        text.extend(given)
        ids = torch.tensor([text if past is None else given])
        # What is yielded must not find the caller's settings changed.
        with torch.no_grad():
            out = model(input_ids=ids.to(model.device), use_cache=True, **{cache: past}, **extra)
        past = getattr(out, cache, None)
        last: Tensor = out.logits[:, -1]
        return last

    return logits


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """[1] from logits [1, vocabulary]."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _ends(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)
