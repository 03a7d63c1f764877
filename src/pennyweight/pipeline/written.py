"""The original's tensors, but for those that the output has otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pennyweight.models.base import Checkpoint, Site, TensorInfo
from pennyweight.pipeline.output import Output


@dataclass(frozen=True)
class WrittenCheckpoint:
    """`original` with the tensors `kept` as they are in the output: a transform changes norms, biases and routers. And
    with its `embedding`, where that was quantized.

    See `Checkpoint` for the members.
    """

    original: Checkpoint
    output: Output
    kept: frozenset[str]
    embedding: Site | None

    @property
    def path(self) -> Path:
        return self.original.path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.original.tensors

    @property
    def decoded_from(self) -> str | None:
        return self.original.decoded_from

    @property
    def weight_files(self) -> list[Path]:
        return self.original.weight_files

    @property
    def config_changes(self) -> Mapping[str, Any]:
        return self.original.config_changes

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """As it was written where it is kept or the embedding, else the original's."""
        if name in self.kept:
            return self.output.read_kept(name, part)
        if self.embedding is not None and name == self.embedding.tensor:
            return self.output.read_rows(self.embedding, part or slice(None)).dequantize().to(self.tensors[name].dtype)
        return self.original.read(name, part)
