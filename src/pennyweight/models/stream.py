"""Calibration windows on their way through the blocks of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Stream:
    """Batches of windows on their way through the blocks.

    hidden      one tensor [windows, tokens, width] a batch: the input of the next block
    arguments   batch -> block -> what else the model passes to that block (masks, rotary tables)
    """

    input_ids: list[Tensor]
    hidden: list[Tensor]
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]

    def branched(self) -> Stream:
        """Another stream that is where this one is."""
        return Stream(self.input_ids, list(self.hidden), self.arguments)


def shared(value: Any, canonical: list[Tensor]) -> Any:
    """`value` with every tensor replaced by an equal one seen before, so that equal masks are held once."""
    if isinstance(value, Tensor):
        for known in canonical:
            if known is value or (
                known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)
            ):
                return known
        canonical.append(value)
        return value
    if isinstance(value, tuple | list):
        return type(value)(shared(item, canonical) for item in value)
    if isinstance(value, dict):
        return {key: shared(item, canonical) for key, item in value.items()}
    return value
