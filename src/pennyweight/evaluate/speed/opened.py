"""Models in torch, opened to be measured: `pennyweight.load`, or transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.evaluate.generate import load_in_transformers, quiet_transformers
from pennyweight.evaluate.speed.base import Asked
from pennyweight.evaluate.speed.read_bytes import bytes_per_token
from pennyweight.inference.experts import PackedStack
from pennyweight.inference.generate import stream
from pennyweight.inference.load import load
from pennyweight.inference.modules import PackedLinear, PackedWeight
from pennyweight.kernels.native import kernel_table
from pennyweight.kernels.packed import round_activations

# Groups of normal numbers that show what rounding costs.
_SAMPLE = 4096
_PAGE = 4096


class OpenedModel:
    """A language model whose texts nothing ends; `facts` say how it is computed."""

    def __init__(self, model: Any, facts: dict[str, Any]) -> None:
        self.facts = facts
        self._model = model
        model.generation_config.eos_token_id = None

    def write(self, prompt: int, tokens: int) -> Iterator[int]:
        """`tokens` tokens, each the most likely one, after a prompt of `prompt` random ones."""
        count = self._model.config.get_text_config().vocab_size
        ids = torch.randint(0, count, (1, prompt), generator=torch.Generator().manual_seed(0))
        return stream(self._model, ids, max_tokens=tokens, temperature=0.0)

    def touch(self) -> None:
        """Have every weight in memory."""
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            _read_pages(tensor)

    def bytes_per_token(self) -> int:
        return bytes_per_token(self._model)


def _read_pages(tensor: Tensor) -> None:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0)
    raw[::_PAGE].sum()


def open_packed(path: Path, asked: Asked) -> OpenedModel:
    """By `pennyweight.load`, its packed weights mapped from the file that it keeps."""
    torch.set_num_threads(asked.threads)
    model = load(path, activations=asked.activations, trust_remote_code=asked.trust_remote_code)
    report = model.load_report
    facts: dict[str, Any] = {
        "packed": report.packed, "packed_bytes": report.packed_bytes, "decoded": dict(report.decoded),
        "cache": None if report.cache is None else str(report.cache), "cache_bytes": report.cache_bytes,
        "is_fresh": report.is_fresh, "notes": report.notes, "kernels": kernel_table(),
    }  # fmt: skip
    if asked.activations == "int8":
        facts["rounding"] = {group: rounding_error(group) for group in _groups(model)}
    return OpenedModel(model, facts)


def open_transformers(path: Path, asked: Asked) -> OpenedModel:
    """As transformers loads it, its quantized weights decoded."""
    quiet_transformers()
    torch.set_num_threads(asked.threads)
    return OpenedModel(load_in_transformers(path, trust_remote_code=asked.trust_remote_code), {})


def _groups(model: Any) -> list[int]:
    """Sizes of the groups in which inputs of packed weights are rounded."""
    owners = (module for module in model.modules() if isinstance(module, PackedLinear | PackedStack))
    parts = (part for owner in owners for part in owner.modules() if isinstance(part, PackedWeight))
    return sorted({part.matrix.layout.group for part in parts})


def rounding_error(group: int) -> float:
    """What rounding to 8 bits does to normally distributed inputs in groups of `group`: the root of the mean square of
    the error, relative to that of the inputs.

    >>> round(100 * rounding_error(32), 1)
    0.5
    """
    x = torch.randn(1, _SAMPLE * group, generator=torch.Generator().manual_seed(0))
    codes, scales = round_activations(x, group)
    return float((x - (codes * scales).view_as(x)).norm() / x.norm())
