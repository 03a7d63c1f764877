"""What of a batch of a loader goes into a network, and what its labels are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pennyweight.core.errors import DataError
from pennyweight.models.network import Batch, Network, batches_of
from pennyweight.models.network.network import Inputs

_LABELS = "labels"


def checked(network: Network, given: Any, *, place: str, needs_labels: bool = False) -> Batch:
    """One batch, as `batches_of` reads it. Raises DataError, which says `place`."""
    try:
        [batch] = batches_of([given], network, needs_labels=needs_labels)
    except DataError as error:
        remedy = ", or train without them: labels=False" if "no labels" in str(error) else ""
        raise DataError(f"{place}: {str(error).removeprefix('batch 0: ').removeprefix('batch 0 ')}{remedy}") from error
    if needs_labels and not isinstance(batch.labels, Tensor):
        raise DataError(
            f"{place}: the labels are of type {type(batch.labels).__name__}: give one tensor of classes behind the "
            "inputs, or train without labels: labels=False"
        )
    return batch


def example_of(net: nn.Module, batch: Any) -> Any:
    """`batch` without labels: of a tuple as many tensors as forward() asks for, of a mapping the names it knows."""
    parameters = inspect.signature(net.forward).parameters
    if isinstance(batch, Mapping):
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        return {name: value for name, value in batch.items() if name in parameters or (takes_any and name != _LABELS)}
    if not isinstance(batch, tuple | list):
        return batch
    if batch and isinstance(batch[0], Mapping):
        return example_of(net, batch[0])
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    asked = sum(one.kind in positional and one.default is one.empty for one in parameters.values())
    return tuple(batch[: asked or len(batch)])


def moved(inputs: Inputs, device: torch.device) -> Inputs:
    """`inputs` with tensors on `device`."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Where its tensors are: all on one device."""
    return next(model.parameters()).device
