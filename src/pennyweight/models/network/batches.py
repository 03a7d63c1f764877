"""Batches of a user's loader, checked before anything is computed with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import DataError
from pennyweight.models.network.network import Inputs, InputValue, Network

# What an array of labels is called.
LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Batch:
    """inputs of the network, and the labels that came with them, if any did."""

    inputs: Inputs
    labels: Any = None


def batches_of(
    loader: Iterable[Any], network: Network, *, limit: int | None = None, needs_labels: bool = False
) -> list[Batch]:
    """The first `limit` batches of `loader`: tensors, tuples of the network's inputs with or without labels behind
    them, (mapping, labels), or mappings from names of arguments, labels under "labels".

    Raises DataError, with the number of the batch, for a loader that yields nothing, inputs of another shape or type
    than those the network was captured with, NaN and infinity, and labels that are needed and missing.
    """
    found: list[Batch] = []
    for place, given in enumerate(loader):
        if limit is not None and place >= limit:
            break
        try:
            batch = Batch(network.inputs(given), _labels(given, network))
            _check(batch.inputs, network)
        except DataError as error:
            raise DataError(f"batch {place}: {error}") from error
        if needs_labels and batch.labels is None:
            raise DataError(
                f"batch {place} has no labels: yield (inputs, labels), or a mapping with one of {', '.join(LABELS)}"
            )
        found.append(batch)
    if not found:
        raise DataError("the loader yields nothing: give at least one batch (a generator that has run out gives none)")
    return found


def _labels(given: Any, network: Network) -> Any:
    if isinstance(given, tuple | list):
        own = max(len(network.example.args), 1)
        rest = given[own:]
        return rest[0] if len(rest) == 1 else (tuple(rest) or None)
    if isinstance(given, Mapping):
        return next((given[name] for name in LABELS if name in given and name not in network.example.kwargs), None)
    return None


def _check(inputs: Inputs, network: Network) -> None:
    missing = [name for name in network.example.kwargs if name not in inputs.kwargs]
    if missing or len(inputs.args) != len(network.example.args):
        wanted = ", ".join(network.argument_names)
        raise DataError(f"the network takes {wanted}: not all of them are there")
    given, wanted_values = inputs.tensors, network.input_values
    if len(given) != len(wanted_values):
        raise DataError(f"{len(given)} tensors, but the network takes {len(wanted_values)}")
    for tensor, (name, wanted_value) in zip(given, wanted_values.items(), strict=True):
        _check_tensor(tensor, name, wanted_value)


def _check_tensor(tensor: Tensor, name: str, wanted: InputValue) -> None:
    sizes = wanted.shape
    fits = len(sizes) == tensor.dim() and all(a in (None, b) for a, b in zip(sizes, tensor.shape, strict=True))
    if not fits:
        allowed = ", ".join("any" if size is None else str(size) for size in sizes)
        fixed = " (the network allows no other batch size)" if sizes and sizes[0] is not None else ""
        raise DataError(
            f"{name} has the shape {list(tensor.shape)}, allowed is [{allowed}]{fixed}: give batches of one shape"
        )
    if tensor.dtype != wanted.dtype:
        raise DataError(f"{name} is {tensor.dtype}, the network was captured with {wanted.dtype}: convert it")
    if tensor.numel() == 0:
        raise DataError(f"{name} is empty: {list(tensor.shape)}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise DataError(f"{name} has NaN or infinity: leave such samples out, or clip them")
