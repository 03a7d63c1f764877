"""What a network is called with, found from what a loader yields; and numbers like it that are nobody's data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pennyweight.core.errors import DataError
from pennyweight.models.network.network import Inputs, Network

_ROWS = 4
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def example_in(net: nn.Module, batch: Any) -> Inputs:
    """The inputs of `net` in a batch that may have labels too: of a tuple as many as `forward` cannot do without, of a
    mapping those that `forward` has arguments for. Raises DataError."""
    parameters = inspect.signature(net.forward).parameters.values()
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Mapping):
        batch = batch[0]
    if isinstance(batch, Mapping):
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        known = {parameter.name for parameter in parameters}
        return Inputs.of({name: part for name, part in batch.items() if takes_all or name in known})
    if isinstance(batch, tuple | list):
        needed = [p for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
        if len(batch) < len(needed):
            names = ", ".join(parameter.name for parameter in needed)
            raise DataError(f"a batch of {len(batch)} parts, but the network takes {names}: yield all of them")
        return Inputs.of(tuple(batch[: max(1, len(needed))]))
    return Inputs.of(batch)


def sample_like(network: Network, *, seed: int = 0) -> Inputs:
    """A few samples of the example's shapes, types and ranges, drawn by `seed`: what an artefact is checked with."""
    generator = torch.Generator().manual_seed(seed)
    example = network.example
    lengths = {len(tensor) for tensor in example.tensors if tensor.dim()}
    rows = min(_ROWS, *lengths) if network.batch_varies and len(lengths) == 1 else None

    def drawn(value: Any) -> Any:
        return _drawn(value if rows is None else value[:rows], generator) if isinstance(value, Tensor) else value

    return Inputs(*pytree.tree_map(drawn, (example.args, dict(example.kwargs))))


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers as in `like`: normal ones within its range; integers between its ends; masks of as many ones a row."""
    like = like.detach().cpu()
    if not like.numel():
        return like
    if not like.is_floating_point():
        low, high = int(like.min()), int(like.max())
        if like.dtype == torch.bool or (low >= 0 and high <= 1):
            order = torch.rand(like.shape, generator=generator).argsort(-1) if like.dim() else torch.tensor(0)
            return like.gather(-1, order) if like.dim() else like
        return torch.randint(low, high + 1, like.shape, generator=generator).to(like.dtype)
    if not bool(torch.isfinite(like).all()):
        return like
    wide = like.double()
    spread = float(wide.std()) if like.numel() > 1 else 0.0
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return (noise * spread + wide.mean()).clamp(wide.min(), wide.max()).to(like.dtype)
