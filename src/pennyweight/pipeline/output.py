"""The output of a run on its way to disk: weights at places known beforehand, and the files that travel with them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.containers.base import Container, Kept
from pennyweight.containers.weight_files import OpenWeightFiles, tensor_bytes
from pennyweight.core.errors import ContainerError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.models.base import Checkpoint, Site, TensorInfo
from pennyweight.pipeline.solve import check_finite
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight

# Bytes of a kept tensor that one thread copies at a time, and bytes that are copied before they go to the disk.
_COPY_BYTES, _FLUSH_BYTES = 1 << 22, 1 << 25
# What travels with the weights: tokenizer, chat templates, generation settings, the further modules of a sentence
# embedder (1_Pooling), licence, and a model's own code.
_CARRIED = (
    "*.json",
    "additional_chat_templates/*.jinja",
    "[0-9]_*/*",
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
# The last three say how weights that are decoded on reading were quantized, and some runtimes believe them.
_NOT_CARRIED = {"config.json", "pennyweight.json", "run.json", "README.md",
                "quantize_config.json", "quant_config.json", "hf_quant_config.json"}  # fmt: skip
_INDICES = (".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True)
class Output:
    """The weight files of an artefact, open for writing, and what each site looks like in them."""

    files: OpenWeightFiles
    container: Container
    plan: Plan
    checkpoint: Checkpoint

    def kept_tensors(self, sites: Sequence[Site]) -> list[str]:
        """Names of the checkpoint's tensors that are in the output, in float."""
        return list(_kept(self.container, self.plan, sites, self.checkpoint))

    def copy_kept(self, names: Sequence[str]) -> None:
        """Copy tensors that stay as they are to the disk, a piece at a time; raises WeightError on NaN or infinity."""
        batch: list[tuple[str, slice | None]] = []
        waiting = 0
        for name in names:
            for part in self._parts(name):
                batch.append((name, part))
                waiting += min(_COPY_BYTES, self.checkpoint.tensors[name].size_bytes)
                if waiting >= _FLUSH_BYTES:
                    self._copy_all(batch)
                    batch, waiting = [], 0
        self._copy_all(batch)
        for name, tensor in self.container.added.items():
            self.files.write(name, tensor)

    def _parts(self, name: str) -> list[slice | None]:
        """Rows that are copied at once, None for the whole tensor."""
        kept = self._kept(name)
        info = self.checkpoint.tensors[name] if kept.stored is None else kept.info
        if not info.shape or info.size_bytes <= _COPY_BYTES or not (kept.by_rows or kept.stored):
            return [None]
        return [*chunks(info.shape[0], max(1, _COPY_BYTES // (info.size_bytes // info.shape[0])))]

    def _copy_all(self, pieces: Sequence[tuple[str, slice | None]]) -> None:
        parallel_map(self._copy, pieces)
        self.files.flush()

    def _copy(self, piece: tuple[str, slice | None]) -> None:
        name, part = piece
        kept = self._kept(name)
        tensor = self.checkpoint.read(name, part) if kept.stored is None else kept.stored(part)
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            check_finite(tensor, name)
        offset = 0 if part is None else part.start * (kept.info.size_bytes // kept.info.shape[0])
        self.files.write_chunk(name, offset, tensor_bytes(tensor if kept.stored else kept.encode(tensor)))

    def _kept(self, name: str) -> Kept:
        kept = self.container.kept(name, self.checkpoint.tensors[name])
        assert kept is not None
        return kept

    def encode_kept(self, name: str, tensor: Tensor) -> Tensor:
        """The checkpoint's `tensor` of that name as `files` hold it."""
        return self._kept(name).encode(tensor)

    def read_kept(self, name: str, part: slice | None = None) -> Tensor:
        """The checkpoint's tensor `name`, or rows of it, as it was written."""
        kept = self._kept(name)
        if part is None or kept.by_rows:
            return kept.decode(self.files.read(name, part))
        return kept.decode(self.files.read(name))[part]

    def write(self, site: Site, weight: QuantizedWeight) -> None:
        for name, tensor in self.container.encode(site, weight).items():
            self.files.write(name, tensor)

    def read(self, site: Site) -> QuantizedWeight:
        """What was written for `site`."""
        scheme = self.plan.schemes[site.name]
        names = self.container.entries(site, scheme)
        return self.container.decode(site, scheme, {name: self.files.read(name) for name in names})

    def read_rows(self, site: Site, rows: slice) -> QuantizedWeight:
        """Some rows of what was written for an embedding."""
        return self._rows(site, [rows])

    def embedding_rows(self, site: Site, ids: Tensor) -> Tensor:
        """The decoded rows of an embedding for token ids [...], float32 [..., width]; no more than these is read."""
        wanted, where = torch.unique(ids, return_inverse=True)
        return self._rows(site, _runs(wanted)).dequantize()[where]

    def _rows(self, site: Site, parts: Sequence[slice]) -> QuantizedWeight:
        """The rows of all `parts`, one after the other."""
        scheme = self.plan.schemes[site.name]
        count = sum(len(range(*part.indices(site.shape[0]))) for part in parts)
        names = self.container.entries(site, scheme)
        found = {name: torch.cat([self.files.read(name, part) for part in parts]) for name in names}
        return self.container.decode(replace(site, shape=(count, site.shape[1])), scheme, found)


def _runs(numbers: Tensor) -> list[slice]:
    """Rising `numbers` [n] as slices, neighbours together."""
    breaks = (numbers.diff() > 1).nonzero().flatten() + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in numbers.tensor_split(breaks)]


def weight_entries(
    container: Container, plan: Plan, sites: Sequence[Site], checkpoint: Checkpoint
) -> dict[str, TensorInfo]:
    """Every tensor that will be written, in the order of writing: what is kept or added, then block after block."""
    replaced = _replaced(plan, sites)
    inside = Counter(site.tensor for site in sites)
    quantized = Counter(site.tensor for site in sites if site.name in plan.schemes)
    for name in replaced:
        here, all_of_it = quantized[name], inside[name]
        if here < all_of_it:
            raise ContainerError(
                f"{name}: {here} of the {all_of_it} matrices in it would be quantized and the others lost: "
                "quantize all of them, or keep all in float"
            )
    entries = {name: kept.info for name, kept in _kept(container, plan, sites, checkpoint).items()}
    entries |= {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in container.added.items()}
    for site in sites:
        if site.name in plan.schemes:
            entries.update(container.entries(site, plan.schemes[site.name]))
    return entries


def _kept(container: Container, plan: Plan, sites: Sequence[Site], checkpoint: Checkpoint) -> dict[str, Kept]:
    replaced = _replaced(plan, sites)
    found = ((name, container.kept(name, info)) for name, info in checkpoint.tensors.items() if name not in replaced)
    return {name: kept for name, kept in found if kept is not None}


def _replaced(plan: Plan, sites: Sequence[Site]) -> dict[str, None]:
    """Names of the checkpoint's tensors that the output has in another form, in the order of `sites`."""
    return dict.fromkeys(site.tensor for site in sites if site.name in plan.schemes)


def carried_files(model: Path) -> list[Path]:
    """Files of the model directory that go along unchanged; a model that is one file has none."""
    if not model.is_dir():
        return []
    found = {file for pattern in _CARRIED for file in model.glob(pattern)}
    return sorted(
        file
        for file in found
        if file.is_file() and str(file.relative_to(model)) not in _NOT_CARRIED and not file.name.endswith(_INDICES)
    )


def config_text(
    model: Path, quantization_config: Mapping[str, Any] | None, *, dtype: str, changes: Mapping[str, Any]
) -> str:
    """config.json of the model with the container's `quantization_config`, if it has one, in place of any former one.

    `dtype` is what the scales were rounded for: the config says it, so that the runtime loads the model in no other.
    `changes` are entries that the written tensors ask for.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
            part.pop("compression_config", None)
    config.update(changes)
    if _said_type(config) != dtype:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part.pop("torch_dtype", None)
                part.pop("dtype", None)
    if not any(config.get(key) for key in ("dtype", "torch_dtype")):
        config["dtype"] = dtype
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _said_type(config: Mapping[str, Any]) -> str | None:
    """In which type a runtime that goes by config.json loads the model."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                return str(part[key]).removeprefix("torch.")
    return None


def carry(model: Path, files: Sequence[Path], directory: Path) -> None:
    for file in files:
        target = directory / file.relative_to(model)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
