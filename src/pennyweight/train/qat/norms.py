"""When the statistics of batch norms stand still, and how they are estimated anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pennyweight.core.errors import DataError
from pennyweight.train.qat.batches import checked, device_of, moved
from pennyweight.train.qat.prepared import PreparedNorm, preparation_of, prepared_norms, unwrapped
from pennyweight.train.qat.statistics import Pool


def freeze_norms(model: nn.Module, *, is_frozen: bool = True) -> None:
    """Let the batch norms of a prepared `model` use their running statistics in training too, and keep them.

    What is trained from then on is the network that will be deployed. It is no part of state_dict(): say it again
    where training is resumed.
    """
    for norm in prepared_norms(model).values():
        norm.statistics.is_frozen = is_frozen


def reestimate_norms(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running statistics of a prepared `model` to those of all `batches` together, its weights as they are.

    Each norm normalises by the statistics of the batch meanwhile. Codes stay, but for scales that a whole matrix
    shares. Nagel et al., "Overcoming oscillations in quantization-aware training" (2022), section 5.2.
    Raises DataError where there are no batches.
    """
    inner = unwrapped(model)
    network = preparation_of(inner).network
    norms = prepared_norms(inner)
    with _pooling(inner, norms) as pools, torch.no_grad():
        place = -1
        for place, batch in enumerate(batches):
            given = moved(checked(network, batch, place=f"batch {place}").inputs, device_of(inner))
            inner(*given.args, **given.kwargs)
        if place < 0:
            raise DataError("no batches to estimate batch norms with: give at least one")
        for path, norm in norms.items():
            mean, variance = pools[path].mean_and_variance
            norm.tensors.mean.copy_(mean)
            norm.tensors.variance.copy_(variance)


@contextmanager
def _pooling(model: nn.Module, norms: dict[str, PreparedNorm]) -> Iterator[dict[str, Pool]]:
    """All else in eval mode; afterwards as before."""
    pools = {path: Pool() for path in norms}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for path, norm in norms.items():
        norm.statistics.pool = pools[path]
    try:
        yield pools
    finally:
        for norm in norms.values():
            norm.statistics.pool = None
        for module, mode in modes:
            module.training = mode
