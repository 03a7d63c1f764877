"""Calibration windows that the model writes itself: for those who have no data, or may not show it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import ModelError
from pennyweight.core.parallel import one_thread_per_operation, parallel_map
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel

SELF = "self"
# Passes over all windows: by the second a window reads like the model's own text, and Hessians hardly change any more.
_PASSES = 3


def own_windows(model: StreamedModel, *, length: int, count: int, seed: int = 0, passes: int = _PASSES) -> Tensor:
    """Token ids int64 [count, length] drawn from the model by Jacobi iteration.

    Windows begin as random tokens, and `passes` times every token is drawn anew from the model's distribution given
    the tokens before it, all positions at once:

        t'_i ~ p(. | t_0 ... t_{i-1})

    After k passes the first k tokens are an exact sample; the rest comes close much sooner (Song et al., "Accelerating
    feedforward computation via parallel nonlinear equation solving", 2021, for the deterministic case). One pass costs
    one run of the model, block by block, where drawing token after token would cost `length` of them. Deterministic for
    a seed. Raises ModelError for a model that is no decoder.
    """
    if not model.is_decoder:
        raise ModelError(
            f"{type(model.module).__name__} does not write text, so it cannot calibrate itself: give a text file"
        )
    size = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(size, (count, length), generator=torch.Generator().manual_seed(seed))
    first = _beginning(model.config)
    if first is not None:
        ids[:, 0] = first
    for turn in range(passes):
        ids = _again(model, ids, seed=seed * passes + turn)
    return ids


def _beginning(config: Any) -> int | None:
    """The token that begins a text, where the config names one."""
    found = getattr(config.get_text_config(), "bos_token_id", None)
    return found if isinstance(found, int) else None


@one_thread_per_operation()
def _again(model: StreamedModel, ids: Tensor, *, seed: int) -> Tensor:
    """`ids` with every token but the first drawn anew."""
    stream = model.start(text.batches(ids))
    for index in range(len(model.blocks)):
        with model.opened(index) as block:
            model.advance(block, index, stream, watched=model.watched(model.sites_of(index)))
    with model.finishing(stream) as finish:

        def draw(batch: int) -> Tensor:
            # A generator for each batch: whoever runs it draws the same.
            generator = torch.Generator().manual_seed(seed * len(stream.hidden) + batch)
            drawn = stream.input_ids[batch].cpu().clone()
            for window, logits in enumerate(finish(batch).float().cpu()):
                drawn[window, 1:] = sampled(logits, generator)[:-1]
            return drawn

        return torch.cat(parallel_map(draw, range(len(stream.hidden))))


def sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token from softmax(logits) for each row [vocabulary]: the one with the largest logit + Gumbel noise."""
    noise = torch.empty(logits.shape).exponential_(generator=generator).to(logits.device)
    return (logits - noise.log_()).argmax(-1)
