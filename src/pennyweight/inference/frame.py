"""A quantized model directory as a model with everything in place but its quantized weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import CheckpointError, ModelError
from pennyweight.inference.mapped import MappedFile
from pennyweight.inference.plan import PackingPlan, parameter_owners, plan_packing
from pennyweight.models.checkpoint import SafetensorsCheckpoint, open_checkpoint
from pennyweight.models.coded import coded_tensors
from pennyweight.models.config_json import read_config_json
from pennyweight.models.decoders import decoded
from pennyweight.models.decoders.base import Coded
from pennyweight.models.decoders.decoded import DecodedCheckpoint
from pennyweight.models.postponed import postponed
from pennyweight.models.skeleton import build_to_run, read_config
from pennyweight.models.weight_map import WeightMap


class Frame:
    """`model` with parameters mapped from the files where they lie there as they are; those that are made of the
    quantized tensors `coded` are on "meta" still. `plan` says what they become."""

    def __init__(self, path: Path, *, dtype: torch.dtype | None, trust_remote_code: bool) -> None:
        self.path = path
        self.checkpoint = _open(path)
        self.coded: Mapping[str, Coded | None] = coded_tensors(self.checkpoint)
        with postponed():
            config = read_config(path, trust_remote_code=trust_remote_code)
            kind = dtype or _own_dtype(config)
            self.model: Any = build_to_run(config, dtype=kind, trust_remote_code=trust_remote_code)
            self.weights = WeightMap(self.model, self.checkpoint)
        self._keeps_float32 = _float32_rule(self.model, kind)
        self._untie()
        self.owners = parameter_owners(self.model)
        self.plan: PackingPlan = plan_packing(self.model, self.weights, self.checkpoint, self.coded)
        self._files: dict[Path, MappedFile] = {}
        self._fill()
        _set_generation(self.model, path)

    def mapped(self, key: str) -> Tensor:
        """The tensor `key` of the checkpoint where it lies."""
        stored = self.checkpoint.stored
        assert isinstance(stored, SafetensorsCheckpoint)
        file, entry = stored.places[key]
        if file not in self._files:
            self._files[file] = MappedFile(file)
        return self._files[file].tensor(begin=entry.begin, dtype=entry.dtype, shape=entry.shape)

    def set(self, name: str, value: Tensor) -> None:
        """Give the parameter or buffer `name` its value, in its type, wherever it is tied to."""
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        before = module._buffers[attribute] if attribute in module._buffers else module._parameters[attribute]
        if value.is_floating_point():
            value = value.to(torch.float32 if self._keeps_float32(name) else before.dtype)
        if attribute in module._buffers:
            module._buffers[attribute] = value
            return
        parameter = nn.Parameter(value, requires_grad=False)
        for one, own in self.owners[name]:
            one._parameters[own] = parameter

    def _fill(self) -> None:
        for name, source in self.weights.sources.items():
            if not any(key in self.coded for key in source.keys):
                self.set(name, self.weights.made(name, self.mapped))
        for name, buffer in self.model.named_buffers():
            if buffer.is_meta:
                raise ModelError(f"{type(self.model).__name__}: the buffer {name} has no value before it is used")

    def _untie(self) -> None:
        """Give a parameter of its own to what the config ties but the checkpoint has two different tensors for."""
        for name in self.weights.untied():
            owner, _, attribute = name.rpartition(".")
            module = self.model.get_submodule(owner)
            module._parameters[attribute] = nn.Parameter(module._parameters[attribute].detach().clone(), False)


def _open(path: Path) -> DecodedCheckpoint:
    if any(path.glob("*.gguf")):
        raise ModelError(f"{path}: holds a GGUF file, which llama.cpp runs: pennyweight run {path} --prompt ...")
    found = decoded(open_checkpoint(path), read_config_json(path))
    if not isinstance(found, DecodedCheckpoint):
        raise ModelError(
            f"{path}: its weights are floats (config.json has no quantization_config); only quantized ones are loaded "
            f"packed. Quantize it (pennyweight quantize {path} --out DIRECTORY), or load it with transformers."
        )
    if found.stored.config_changes:
        raise CheckpointError(f"{path}: its weights are not stored as its config.json says")
    return found


def _own_dtype(config: Any) -> torch.dtype:
    for part in (config, config.get_text_config()):
        if isinstance(getattr(part, "dtype", None), torch.dtype):
            return part.dtype  # type: ignore[no-any-return]
    return torch.float32


def _float32_rule(model: Any, dtype: torch.dtype) -> Any:
    """Whether transformers keeps a parameter of this name in float32 in a model of `dtype`."""
    patterns = [pattern.replace(".", r"\.").replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    if not patterns:
        return lambda name: False
    return re.compile(rf"(^|\.)({'|'.join(patterns)})($|\.)").search


def _set_generation(model: Any, path: Path) -> None:
    """What generation_config.json says of sampling and of the tokens that end a text."""
    from transformers import GenerationConfig

    model.config.name_or_path = str(path)
    if (path / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
