"""Checkpoints that are already quantized: their weights are decoded to floats when they are read.

One file a kind, found by scanning this folder; `name` is the `quant_method` that a model's config.json gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pennyweight.core.errors import CheckpointError
from pennyweight.core.registry import provided
from pennyweight.models.base import Checkpoint
from pennyweight.models.decoders.base import Decoder
from pennyweight.models.decoders.decoded import DecodedCheckpoint

__all__ = ["decoded"]

_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def decoded(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """`checkpoint` with its quantized weights decoded as the model's `config` (of config.json) says.

    A checkpoint of floats is returned as it is. Decoded weights have the type that the config gives the model, else
    that of their scales. Raises CheckpointError for a kind of quantization that is not known, by its name.
    """
    settings = _settings(config)
    if settings is None:
        return checkpoint
    known: dict[str, Decoder] = provided("models.decoders")
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in known:
        raise CheckpointError(
            f"{checkpoint.path}: its weights are quantized with {method!r}; known are {', '.join(known)}. "
            "Give the original model, or save it dequantized."
        )
    decoding = known[method].open(checkpoint, settings, _model_dtype(config))
    if not decoding.tensors:
        raise CheckpointError(
            f"{checkpoint.path}: config.json says that the weights are quantized with {method}, but no tensor is. "
            "Remove quantization_config from config.json if they are floats."
        )
    return DecodedCheckpoint(checkpoint, decoding)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        if isinstance(part.get("quantization_config"), Mapping):
            found: Mapping[str, Any] = part["quantization_config"]
            return found
        if isinstance(part.get("compression_config"), Mapping):
            # The older name of the key, which only compressed-tensors ever wrote.
            return {"quant_method": "compressed-tensors", **part["compression_config"]}
    return None


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    for part in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(name, torch.dtype | str) and str(name).removeprefix("torch.") in _FLOATS:
                return _FLOATS[str(name).removeprefix("torch.")]
    return None
