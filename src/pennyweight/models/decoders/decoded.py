"""A checkpoint seen through a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.models.decoders.base import Decoding


@dataclass(frozen=True)
class DecodedCheckpoint:
    """`stored` with the tensors of `decoding` in the place of those that it consumed."""

    stored: Checkpoint
    decoding: Decoding

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def weight_files(self) -> list[Path]:
        return self.stored.weight_files

    @property
    def config_changes(self) -> Mapping[str, Any]:
        return self.stored.config_changes

    @property
    def decoded_from(self) -> str | None:
        return self.decoding.description

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        kept = {name: info for name, info in self.stored.tensors.items() if name not in self.decoding.consumed}
        return kept | {name: virtual.info for name, virtual in self.decoding.tensors.items()}

    def read(self, name: str, part: slice | None = None) -> Tensor:
        if name in self.decoding.tensors:
            return self.decoding.tensors[name].read(part)
        if name in self.decoding.consumed:
            raise CheckpointError(
                f"{self.path}: {name!r} is part of a quantized weight: read the decoded weight instead"
            )
        return self.stored.read(name, part)
