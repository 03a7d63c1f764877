"""The codes of a checkpoint that is already quantized."""

from __future__ import annotations

from collections.abc import Mapping

from pennyweight.models.base import Checkpoint
from pennyweight.models.decoders.base import Coded
from pennyweight.models.decoders.decoded import DecodedCheckpoint


def coded_tensors(checkpoint: Checkpoint) -> Mapping[str, Coded | None]:
    """How each quantized tensor of `checkpoint` is stored, by the name of the weight it is decoded to; None where no
    scheme says it."""
    if isinstance(checkpoint, DecodedCheckpoint):
        return {name: virtual.coded() for name, virtual in checkpoint.decoding.tensors.items()}
    from pennyweight.models.gguf.checkpoint import GgufCheckpoint

    if isinstance(checkpoint, GgufCheckpoint):
        return {name: coded for name in checkpoint.places if (coded := checkpoint.coded(name)) is not None}
    return {}
