"""What is in a GGUF file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from pennyweight.models.gguf.file import read_gguf


@dataclass(frozen=True)
class TensorFacts:
    """shape outermost axis first; type as ggml calls it."""

    name: str
    shape: tuple[int, ...]
    type: str
    size_bytes: int


@dataclass(frozen=True)
class GgufInventory:
    """architecture "" where the file holds no model; fields key -> value, of an array how many it has."""

    files: list[str]
    architecture: str
    weights: int
    size_bytes: int
    fields: dict[str, object]
    tensors: list[TensorFacts]


def gguf_inventory(first: Path) -> GgufInventory:
    """Everything but the weights; raises CheckpointError."""
    file = read_gguf(first)
    tensors = [
        TensorFacts(name, tensor.shape, GGMLQuantizationType(tensor.type_number).name, tensor.size_bytes)
        for name, tensor in file.tensors.items()
    ]
    fields = {
        key: field.value if field.count is None else f"{field.count} x {field.kind.name}"
        for key, field in file.fields.items()
    }
    return GgufInventory(
        files=[str(part) for part in file.files],
        architecture=str(fields.get("general.architecture", "")),
        weights=sum(math.prod(one.shape) for one in tensors),
        size_bytes=sum(one.size_bytes for one in tensors),
        fields=fields,
        tensors=tensors,
    )
