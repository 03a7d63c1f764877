"""Text by a loaded model, token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def stream(
    model: Any, ids: Tensor, *, max_tokens: int, temperature: float, generator: torch.Generator | None = None
) -> Iterator[int]:
    """The tokens that continue `ids` [1, tokens], one after the other, the one that ends the text too.

    With temperature 0 the most likely one each time, else drawn by `generator` (torch's own by default) from the
    softmax of logits / temperature. Nothing else of generation_config.json is heeded than the tokens that end a text.
    """
    ends = _ends(model)
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    given, past = ids, None
    for _ in range(max_tokens):
        # What is yielded must not find the caller's settings changed.
        with torch.no_grad():
            out = model(input_ids=given, past_key_values=past, use_cache=True, **extra)
            token = _chosen(out.logits[:, -1], temperature, generator)
        yield int(token)
        if int(token) in ends:
            return
        past = getattr(out, "past_key_values", None)
        given = token.view(1, 1) if past is not None else torch.cat([given, token.view(1, 1)], dim=1)


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """[1] from logits [1, vocabulary]."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _ends(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)
