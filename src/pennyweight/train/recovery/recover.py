"""Recovery: scales, norms and biases trained end to end against the original, with codes frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.core.errors import DataError
from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel
from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.learned.descent import drawn_batches
from pennyweight.train.recovery.student import Slopes, Student
from pennyweight.train.recovery.teacher import Teacher, teaching

# Of Adam (Kingma, Ba, arXiv:1412.6980): its second moments forget faster than usual, a run has few steps.
_BETAS = (0.9, 0.99)
# Far below any slope: the step does not depend on the size of the loss.
_EPSILON = 1e-12


@dataclass(frozen=True)
class Settings:
    """epochs       passes over the windows that are trained on
    batch        batches of windows (512 tokens each, fewer where lengths differ) a step
    rate         of Adam at its highest, in units of each number's own size at 4 bits: 0.001 moves a scale by a
                 thousandth a step, by two thousandths at 3 bits, by a two-thousandth at 5
    warm_up      share of the steps over which the rate rises from zero; from there it falls to zero as a cosine
    clip         slopes are shortened to this multiple of their mean length so far
    held_out     one batch in so many is not trained on and decides which step is kept
    checks       how often it is asked
    tokens       the teacher's most likely tokens that count by themselves, all others together as one
    temperature  of both softmaxes
    seed         of the order of batches
    """

    epochs: float = 3.0
    batch: int = 2
    rate: float = 1e-3
    warm_up: float = 0.1
    clip: float = 2.0
    held_out: int = 10
    checks: int = 4
    tokens: int = 256
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """Told after each step; `held_out` where it was asked."""

    done: int
    total: int
    loss: float
    held_out: float | None


@dataclass(frozen=True)
class Recovered:
    """weights, vectors   all sites, and all norms and biases by checkpoint name, after the best step
    before, after      loss on the held-out batches; the same where no step was better
    step, steps        the best step (0: the start) of how many
    """

    weights: Mapping[str, QuantizedWeight]
    vectors: Mapping[str, Tensor]
    before: float
    after: float
    step: int
    steps: int


def recover(
    model: StreamedModel,
    original: StreamedModel,
    weights: Mapping[str, QuantizedWeight],
    windows: Iterable[Tensor],
    directory: Path,
    *,
    settings: Settings = Settings(),
    tell: Callable[[Step], None] = lambda step: None,
) -> Recovered:
    """Minimise over scales s, norms and biases v, with codes c fixed, the mean over tokens of

        KL(original || model with weights s * (value(c) - zero) and v)

    (mean squared distance of hidden states for an encoder) by Adam on straight-through float32 masters:
    Chen et al., EfficientQAT, arXiv:2407.11062, section 3.3, with distillation in place of the labels. The result is
    the step that is best on held-out windows in exactly the stored values, the start included.

    `model` is what runs with `weights` (by site name); `windows` [tokens] of calibration text; the teacher's
    outputs are kept in files in `directory` meanwhile. Raises DataError for fewer than two batches of windows.
    """
    batches = text.batches(windows)
    trained, held = split(len(batches), settings)
    with (
        one_thread_per_operation(),
        teaching(original, batches, directory, count=settings.tokens, temperature=settings.temperature) as teacher,
    ):
        student = Student(model, weights, batches)
        return _Training(student, teacher, trained, held, settings, tell).run()


def split(batches: int, settings: Settings) -> tuple[list[int], list[int]]:
    """Of so many batches those that are trained on and those that are held out; raises DataError."""
    if batches < 2:
        raise DataError(
            f"recovery was given {batches} batch of windows: it trains on some and decides on others; give more text"
        )
    every = min(settings.held_out, batches)
    held = [batch for batch in range(batches) if batch % every == every - 1]
    return [batch for batch in range(batches) if batch not in held], held


@dataclass(frozen=True)
class _Training:
    student: Student
    teacher: Teacher
    trained: Sequence[int]
    held: Sequence[int]
    settings: Settings
    tell: Callable[[Step], None]

    def run(self) -> Recovered:
        optimiser = torch.optim.Adam(
            [master.step for master in self.student.masters.values()], betas=_BETAS, eps=_EPSILON, foreach=False
        )
        steps = self._steps()
        before = after = self._held_out()
        best, kept = 0, self._copied()
        lengths: list[float] = []
        self.tell(Step(0, len(steps), before, before))
        for number, batches in enumerate(steps, start=1):
            loss, slopes = self.student.slopes(self.teacher, batches)
            self._move(optimiser, self._clipped(slopes, lengths), self._rate(number, len(steps)))
            held_out = self._held_out() if self._is_checked(number, len(steps)) else None
            if held_out is not None and held_out < after:
                after, best, kept = held_out, number, self._copied()
            self.tell(Step(number, len(steps), loss, held_out))
        for name, master in self.student.masters.items():
            master.step.copy_(kept[name])
        return Recovered(self.student.weights, self.student.vectors, before, after, best, len(steps))

    def _steps(self) -> list[list[int]]:
        """The batches of every step: each epoch in an order of its own."""
        size = min(self.settings.batch, len(self.trained))
        count = int(self.settings.epochs * len(self.trained)) // size
        drawn = drawn_batches(len(self.trained), size, count, self.settings.seed)
        return [[self.trained[place] for place in places] for places in drawn]

    def _rate(self, number: int, steps: int) -> float:
        rising = max(1.0, self.settings.warm_up * steps)
        if number <= rising:
            return self.settings.rate * number / rising
        return self.settings.rate * 0.5 * (1 + math.cos(math.pi * (number - rising) / (steps - rising)))

    def _clipped(self, slopes: Slopes, lengths: list[float]) -> Slopes:
        length = math.sqrt(math.fsum(float(slope.double().square().sum()) for slope in slopes.values()))
        limit = self.settings.clip * math.fsum(lengths) / len(lengths) if lengths else math.inf
        lengths.append(min(length, limit))
        return slopes if length <= limit else {name: slope * (limit / length) for name, slope in slopes.items()}

    def _move(self, optimiser: torch.optim.Adam, slopes: Slopes, rate: float) -> None:
        for name, master in self.student.masters.items():
            # What no token reached does not move.
            master.step.grad = slopes.get(name)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()

    def _held_out(self) -> float:
        return self.student.loss(self.teacher, self.held)

    def _is_checked(self, number: int, steps: int) -> bool:
        """At evenly spaced steps and after the last."""
        checks = min(self.settings.checks, steps)
        return number * checks // steps > (number - 1) * checks // steps

    def _copied(self) -> dict[str, Tensor]:
        return {name: master.step.clone() for name, master in self.student.masters.items()}
