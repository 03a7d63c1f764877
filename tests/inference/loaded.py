"""Artefacts of tiny models, and what the float model with the decoded weights says to the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.containers.artefacts import TOKENS, Artefact, Source

# float32 sums of a few hundred products in another order, through two blocks.
TOLERANCE = 2e-5


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        result = model(input_ids=tokens % model.config.get_text_config().vocab_size)
    out = result.logits if "logits" in result else result.last_hidden_state
    assert isinstance(out, Tensor)
    return out.float()


def decoded_model(src: Source, artefact: Artefact) -> Any:
    """transformers' own model with the weights that the artefact's codes mean."""
    plain = artefact.directory.parent / f"{artefact.directory.name}-decoded"
    plain.mkdir()
    (plain / "config.json").write_bytes((src.directory / "config.json").read_bytes())
    save_file(dict(artefact.decoded), plain / "model.safetensors", metadata={"format": "pt"})
    return src.auto.from_pretrained(plain).eval()


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())
