"""A few of all calibration samples, where looking at all would take too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pennyweight.models.network.network import Inputs, Network


def some_samples(network: Network, batches: Sequence[Inputs], count: int) -> list[Inputs]:
    """About `count` samples: whole batches, evenly spread; the first samples of one batch where that is more, if the
    network allows other sizes."""
    sizes = [samples_of(batch) for batch in batches]
    total = sum(sizes)
    if total <= count or not batches:
        return list(batches)
    wanted = max(1, len(batches) * count // total)
    chosen = [batches[place * len(batches) // wanted] for place in range(wanted)]
    if wanted > 1 or samples_of(chosen[0]) <= count or not network.batch_varies:
        return chosen
    return [_cut(chosen[0], count)]


def samples_of(batch: Inputs) -> int:
    return next((len(tensor) for tensor in batch.tensors if tensor.dim()), 1)


def _cut(batch: Inputs, count: int) -> Inputs:
    size = samples_of(batch)

    def cut(value: Any) -> Any:
        return value[:count] if isinstance(value, Tensor) and value.dim() and len(value) == size else value

    args, kwargs = pytree.tree_map(cut, (batch.args, dict(batch.kwargs)))
    return Inputs(args, kwargs)
