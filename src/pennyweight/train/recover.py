"""Recovery: scales, norms and biases trained end to end against the original, with codes frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.models.streamed import StreamedModel
from pennyweight.schemes import QuantizedWeight
from pennyweight.train.student import Slopes, Student
from pennyweight.train.teacher import Teacher


@dataclass(frozen=True)
class Settings:
    """epochs         passes over the training batches
    batch          batches of windows (of about 512 tokens) a step
    rate           of Adam at its highest, in units of a scale (0.01: about one hundredth of each scale a step)
    warm_up        share of the steps over which the rate rises from zero; then it falls as a cosine to zero
    clip           largest norm of all slopes together
    held_out       one in this many batches is never trained on: it decides which values are kept
    checks         how often that is asked
    seed           the order of batches
    """

    epochs: float = 2.0
    batch: int = 4
    rate: float = 1e-3
    warm_up: float = 0.1
    clip: float = 1.0
    held_out: int = 8
    checks: int = 8
    seed: int = 0
    vectors: float = 1.0
    beta2: float = 0.99


@dataclass(frozen=True)
class Step:
    """Told after each step; `held_out` where it was asked."""

    done: int
    total: int
    loss: float
    held_out: float | None


def train(student: Student, teacher: Teacher, batches: int, settings: Settings, tell: Callable[[Step], None]) -> tuple[float, float]:
    held = [b for b in range(batches) if b % settings.held_out == settings.held_out - 1]
    rest = [b for b in range(batches) if b not in held]
    masters = student.masters
    names = list(masters)
    def check() -> float:
        found = student.losses(teacher, held)
        return math.fsum(found) / len(found)
    first = best = check()
    kept = {name: m.step.clone() for name, m in masters.items()}
    is_vec = {name: not name.endswith((".scales", ".offsets", ".zeros")) for name in names}
    optimiser = torch.optim.Adam(
        [{"params": [masters[n].step for n in names if not is_vec[n]], "factor": 1.0}, {"params": [masters[n].step for n in names if is_vec[n]], "factor": settings.vectors}], lr=0.0, betas=(0.9, settings.beta2), eps=1e-12, foreach=False)
    total = int(settings.epochs * len(rest) / settings.batch)
    order: list[int] = []
    g = torch.Generator().manual_seed(settings.seed)
    tell(Step(0, total, math.nan, first))
    for step in range(1, total + 1):
        while len(order) < settings.batch:
            order += [rest[i] for i in torch.randperm(len(rest), generator=g).tolist()]
        now, order = order[: settings.batch], order[settings.batch :]
        loss, slopes = student.slopes(teacher, now)
        warm = max(1, settings.warm_up * total)
        rate = settings.rate * (step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))))
        norm = math.sqrt(sum(float(s.double().square().sum()) for s in slopes.values()))
        for n in names:
            s = slopes.get(n)
            masters[n].step.grad = s
        for group in optimiser.param_groups:
            group["lr"] = rate * group["factor"]
        optimiser.step()
        value = None
        if step % max(1, total // settings.checks) == 0 or step == total:
            value = check()
            if value < best:
                best = value
                kept = {name: m.step.clone() for name, m in masters.items()}
        tell(Step(step, total, loss, value))
    for name, m in masters.items():
        m.step.copy_(kept[name])
    return first, best
