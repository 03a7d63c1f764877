"""A checkpoint whose tensors are rotated when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.models.checkpoint import row_range
from pennyweight.transforms.hadamard import Rotation


@dataclass(frozen=True)
class Step:
    """t -> (t * scale) Q along `axis` (negative) of a tensor, on the entries `rows` of that axis, all where None."""

    axis: int
    rotation: Rotation
    scale: Tensor | None = None
    rows: Tensor | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor, float32 or float64, after the step."""
        last = tensor.movedim(self.axis, -1)
        part = last if self.rows is None else last[..., self.rows]
        turned = self.rotation.apply(part if self.scale is None else part * self.scale.to(part))
        if self.rows is None:
            return turned.movedim(-1, self.axis)
        made = last.clone()
        made[..., self.rows] = turned
        return made.movedim(-1, self.axis)


@dataclass(frozen=True)
class RotatedCheckpoint:
    """The tensors of `original` after their `steps`; see `Checkpoint` for the other members.

    replaced        tensors that are given here: the weights and biases of norms
    added           name of a tensor that `original` has not -> the one it is made from: a head that is tied no more
    config_changes  what the model's config must say instead for the tensors to mean the same model
    """

    original: Checkpoint
    tensors: Mapping[str, TensorInfo]
    steps: Mapping[str, tuple[Step, ...]]
    replaced: Mapping[str, Tensor]
    added: Mapping[str, str]
    config_changes: Mapping[str, Any]

    @staticmethod
    def of(
        original: Checkpoint,
        *,
        steps: Mapping[str, tuple[Step, ...]],
        replaced: Mapping[str, Tensor],
        added: Mapping[str, str],
        config_changes: Mapping[str, Any],
        stored: torch.dtype | None = None,
    ) -> RotatedCheckpoint:
        """`stored` is the type of the changed tensors, None for each one's own."""
        infos = dict(original.tensors) | {name: original.tensors[origin] for name, origin in added.items()}
        changed = {*steps, *replaced} if stored is not None else set()
        tensors = {
            name: TensorInfo(stored, info.shape) if stored is not None and name in changed else info
            for name, info in infos.items()
        }
        return RotatedCheckpoint(original, tensors, steps, replaced, added, config_changes)

    @property
    def path(self) -> Path:
        return self.original.path

    @property
    def decoded_from(self) -> str | None:
        return self.original.decoded_from

    @property
    def weight_files(self) -> list[Path]:
        return self.original.weight_files

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """The rotated tensor, computed in float32 (float64 where that is the stored type), rounded to its type."""
        origin = self.added.get(name, name)
        steps = self.steps.get(name, ())
        if not steps and name not in self.replaced:
            return self.original.read(origin, part)
        info = self.tensors[name]
        # Rows can be turned one by one unless a step mixes them.
        is_by_rows = name not in self.replaced and all(-step.axis < len(info.shape) for step in steps)
        given = self.replaced.get(name)
        whole = self.original.read(origin, part if is_by_rows else None) if given is None else given
        whole = whole.to(torch.float64 if info.dtype == torch.float64 else torch.float32)
        for step in steps:
            whole = step.apply(whole)
        if part is not None and not is_by_rows:
            whole = whole[slice(*row_range(name, info.shape, part))]
        return whole.to(info.dtype).contiguous().clone()
