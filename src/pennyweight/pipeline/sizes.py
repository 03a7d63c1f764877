"""What bits per weight are counted from."""

from __future__ import annotations

import math

from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.streamed import StreamedModel


def weight_count(model: StreamedModel) -> int:
    """Weights of the model, tied ones once even where the checkpoint stores them twice."""
    tensors = model.checkpoint.tensors
    twice = {key for name in model.weights.tied for key in _keys(model, name)}
    once = {key for origin in model.weights.tied.values() for key in _keys(model, origin)}
    has_origin = bool(once)
    return sum(math.prod(info.shape) for name, info in tensors.items() if not (has_origin and name in twice - once))


def tensor_bytes(model: StreamedModel) -> int:
    """Bytes of all tensors as they are stored, packed or not; the headers of the files are not counted."""
    return open_checkpoint(model.path).stored_bytes


def _keys(model: StreamedModel, parameter: str) -> list[str]:
    source = model.weights.sources.get(parameter)
    return [] if source is None else source.keys
