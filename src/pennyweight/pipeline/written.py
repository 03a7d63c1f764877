"""The original's tensors, but for those that the output has otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pennyweight.containers.weight_files import OpenWeightFiles
from pennyweight.models.base import Checkpoint, TensorInfo


@dataclass(frozen=True)
class WrittenCheckpoint:
    """`original` with the tensors `kept` as they are in the output: a transform changes norms, biases and routers.

    See `Checkpoint` for the members.
    """

    original: Checkpoint
    files: OpenWeightFiles
    kept: frozenset[str]

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
        """As it was written where it is kept, else the original's."""
        return self.files.read(name, part) if name in self.kept else self.original.read(name, part)
