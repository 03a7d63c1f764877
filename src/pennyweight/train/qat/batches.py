"""What of a batch of a loader goes into a network, and what its labels are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pennyweight.core.errors import DataError
from pennyweight.models.network import Network
from pennyweight.models.network.network import Inputs

LABELS = "labels"


def inputs_of(network: Network, batch: Any) -> Inputs:
    """Of a tuple as many tensors as the network takes, of a mapping those by name. Raises DataError."""
    given, example = network.inputs(batch), network.example
    missing = [name for name in example.kwargs if name not in given.kwargs]
    if missing or len(given.args) < len(example.args):
        found = [*(f"argument {place}" for place in range(len(given.args))), *given.kwargs]
        wanted = [*(f"argument {place}" for place in range(len(example.args))), *example.kwargs]
        raise DataError(
            f"a batch with {', '.join(found) or 'nothing'}; the network was captured with {', '.join(wanted)}: "
            "give batches like the example"
        )
    return Inputs(given.args, {name: given.kwargs[name] for name in example.kwargs})


def labels_of(network: Network, batch: Any) -> Tensor:
    """What a tuple has behind the inputs, what a mapping calls "labels". Raises DataError where there is none."""
    if isinstance(batch, Mapping):
        found = batch.get(LABELS)
        where = f"has no {LABELS!r}, only {', '.join(map(str, batch))}"
    else:
        parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        count = len(network.example.args)
        found = parts[count] if len(parts) > count else None
        where = f"has {len(parts)} tensors, of which the network takes {count}: nothing is left for labels"
    if not isinstance(found, Tensor):
        raise DataError(f"a batch {where}; give (inputs, labels), or train without them: labels=False")
    return found


def example_of(net: nn.Module, batch: Any) -> Any:
    """`batch` without labels: of a tuple as many tensors as forward() asks for, of a mapping the names it knows."""
    parameters = inspect.signature(net.forward).parameters
    if isinstance(batch, Mapping):
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        return {name: value for name, value in batch.items() if (name in parameters or takes_any) and name != LABELS}
    if not isinstance(batch, tuple | list):
        return batch
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    asked = sum(one.kind in positional and one.default is one.empty for one in parameters.values())
    return tuple(batch[: asked or len(batch)])
