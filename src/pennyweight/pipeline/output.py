"""The output of a run on its way to disk: weights at places known beforehand, and the files that travel with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pennyweight.containers.base import Container
from pennyweight.containers.weight_files import OpenWeightFiles, tensor_bytes
from pennyweight.models.base import Checkpoint, Site, TensorInfo
from pennyweight.pipeline.solve import check_finite
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight

# Bytes of a kept tensor that are in memory at a time.
_COPY_BYTES = 1 << 24
# What travels with the weights: tokenizer, chat template, generation settings, licence, and a model's own code.
_CARRIED = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.py",
)
_NOT_CARRIED = {"config.json", "model.safetensors.index.json", "pennyweight.json", "run.json", "README.md"}


@dataclass(frozen=True)
class Output:
    """The weight files of an artefact, open for writing, and what each site looks like in them."""

    files: OpenWeightFiles
    container: Container
    plan: Plan
    checkpoint: Checkpoint

    def kept_tensors(self, sites: Sequence[Site]) -> list[str]:
        replaced = {site.tensor for site in sites if site.name in self.plan.schemes}
        return [name for name in self.checkpoint.tensors if name not in replaced]

    def copy_kept(self, names: Sequence[str]) -> None:
        """Copy tensors that stay as they are, a piece at a time; raises WeightError on NaN or infinity."""
        for name in names:
            for offset, piece in self._pieces(name):
                if piece.is_floating_point() and piece.dtype.itemsize > 1:
                    check_finite(piece, name)
                self.files.write_chunk(name, offset, tensor_bytes(piece))

    def _pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        info = self.checkpoint.tensors[name]
        if not info.shape or info.size_bytes <= _COPY_BYTES:
            yield 0, self.checkpoint.read(name)
            return
        row_bytes = info.size_bytes // info.shape[0]
        rows = max(1, _COPY_BYTES // row_bytes)
        for start in range(0, info.shape[0], rows):
            yield start * row_bytes, self.checkpoint.read(name, slice(start, min(start + rows, info.shape[0])))

    def write(self, site: Site, weight: QuantizedWeight) -> None:
        for name, tensor in self.container.encode(site, weight).items():
            self.files.write(name, tensor)

    def read(self, site: Site) -> QuantizedWeight:
        """What was written for `site`."""
        scheme = self.plan.schemes[site.name]
        names = self.container.entries(site, scheme)
        return self.container.decode(site, scheme, {name: self.files.read(name) for name in names})


def weight_entries(
    container: Container, plan: Plan, sites: Sequence[Site], checkpoint: Checkpoint
) -> dict[str, TensorInfo]:
    """Every tensor that will be written, in the checkpoint's order."""
    quantized = {site.tensor: site for site in sites if site.name in plan.schemes}
    entries: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        site = quantized.get(name)
        entries.update({name: info} if site is None else container.entries(site, plan.schemes[site.name]))
    return entries


def carried_files(model: Path) -> list[Path]:
    """Files of the model directory that go along unchanged."""
    found = {file for pattern in _CARRIED for file in model.glob(pattern)}
    weights = {".safetensors.index.json", ".bin.index.json"}
    return sorted(
        file
        for file in found
        if file.is_file() and file.name not in _NOT_CARRIED and not any(file.name.endswith(end) for end in weights)
    )


def write_config(model: Path, directory: Path, quantization_config: Mapping[str, Any]) -> None:
    """config.json of the model with the container's `quantization_config` in place of any former one."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
            part.pop("compression_config", None)
    config["quantization_config"] = dict(quantization_config)
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def carry(files: Sequence[Path], directory: Path) -> None:
    for file in files:
        shutil.copyfile(file, directory / file.name)
