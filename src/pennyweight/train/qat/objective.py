"""What training makes small: the distance to the labels, and to what the float network says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as f
from torch import Tensor

from pennyweight.core.errors import DataError, UsageError

# Of outputs that are logits, or of any others.
Distance = Literal["kl", "squares"]


@dataclass(frozen=True)
class Objective:
    """alpha CE(labels, q) + (1 - alpha) D(teacher, q), one of them alone where the other is missing.

    D is T² KL(softmax(t / T) || softmax(q / T)), mean over samples (Hinton, Vinyals, Dean, "Distilling the knowledge in
    a neural network", section 2), or with "squares" |t - q|² / |t|².

    class_axis  axis of the outputs along which the classes are
    """

    alpha: float = 0.5
    temperature: float = 2.0
    distance: Distance = "kl"
    class_axis: int = -1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or not self.temperature > 0:
            raise UsageError(
                f"alpha {self.alpha} and temperature {self.temperature}: give 0 <= alpha <= 1 and a temperature above 0"
            )

    def loss(self, q: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """float32 []; `q` and `teacher` are outputs, `labels` int64 classes or float probabilities."""
        if teacher is None and labels is None:
            raise UsageError("neither labels nor a teacher: give one of them, there is nothing to learn from")
        parts = []
        if labels is not None:
            wanted = f.cross_entropy(q.float().movedim(self.class_axis, 1), labels)
            parts.append(wanted * (1.0 if teacher is None else self.alpha))
        if teacher is not None:
            parts.append(self._distance(q.float(), teacher.float()) * (1.0 if labels is None else 1 - self.alpha))
        return torch.stack(parts).sum()

    def _distance(self, q: Tensor, t: Tensor) -> Tensor:
        if self.distance == "squares":
            return (t - q).square().sum() / t.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        log_p, log_q = ((x / self.temperature).log_softmax(self.class_axis) for x in (t, q))
        each = (log_p.exp() * (log_p - log_q)).sum(self.class_axis)
        return self.temperature**2 * each.mean()


def logits_of(outputs: Any) -> Tensor:
    """The tensor that counts: the output itself, the first of several, or what is called "logits".

    Raises DataError where there is none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        parts = [outputs["logits"]] if "logits" in outputs else list(outputs.values())
    else:
        parts = list(outputs) if isinstance(outputs, tuple | list) else []
    if parts and isinstance(parts[0], Tensor):
        return parts[0]
    raise DataError(f"the network gives a {type(outputs).__name__}: let it give a tensor, a tuple or a mapping of them")
