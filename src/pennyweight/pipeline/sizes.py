"""What bits per weight are counted from."""

from __future__ import annotations

import math

from pennyweight.models.base import StoredModel
from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.streamed import StreamedModel


def weight_count(model: StoredModel) -> int:
    """Weights of the model, tied ones once even where the checkpoint stores them twice."""
    tensors, twice = model.checkpoint.tensors, model.stored_twice
    return sum(math.prod(info.shape) for name, info in tensors.items() if name not in twice)


def tensor_bytes(model: StreamedModel) -> int:
    """Bytes of all tensors as they are stored, packed or not; the headers of the files are not counted."""
    return open_checkpoint(model.path).stored_bytes
