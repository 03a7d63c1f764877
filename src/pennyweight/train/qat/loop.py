"""The loop of a training: epochs, held-out data, checkpoints, an early end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from pennyweight.core.errors import DataError
from pennyweight.train.qat.checkpoint import load, save
from pennyweight.train.qat.norms import reestimate_norms
from pennyweight.train.qat.options import FitOptions
from pennyweight.train.qat.oscillation import Oscillations
from pennyweight.train.qat.prepared import copied, preparation_of
from pennyweight.train.qat.randomness import epoch_of
from pennyweight.train.qat.training import Step, Training

Judge = Callable[[nn.Module], float]
# Batches from which ranges start, and from which batch norms are estimated anew.
_CALIBRATING, _ESTIMATING = 8, 50
# Of the streams of random numbers: those that the loader draws for an epoch, for calibration, for estimation.
_EPOCHS, _BEFORE, _AFTER = 0, 2, 3


@dataclass(frozen=True)
class Fitted:
    """Told at the end.

    step            after which the tensors are taken; 0: those that training started from
    done, total     steps that were made, and that were planned
    held_out        what the held-out data say of the result, lower is better; None without them
    is_interrupted  the keyboard ended it early
    is_reestimated  batch norms were estimated anew at the end
    oscillations    after the last step
    """

    step: int
    done: int
    total: int
    held_out: float | None
    is_interrupted: bool
    is_reestimated: bool
    oscillations: Oscillations


Tell = Callable[[Step | Fitted], None]


@dataclass(frozen=True)
class Feed:
    """loader   batches to train on, `steps` times `accumulate` of them an epoch, the last step with what is left
    validation  held-out batches, or None
    """

    loader: Iterable[Any]
    validation: Iterable[Any] | None
    options: FitOptions
    steps: int

    @staticmethod
    def of(loader: Iterable[Any], validation: Iterable[Any] | None, options: FitOptions) -> Feed:
        """Raises DataError where the loader yields nothing."""
        batches = _length(loader, options.seed)
        if not batches:
            raise DataError("the loader yields no batches: give at least one, in a loader that can be read again")
        return Feed(loader, validation, options, math.ceil(batches / options.accumulate))

    @property
    def calibrating(self) -> list[Any]:
        return list(itertools.islice(epoch_of(self.loader, self.options.seed, _BEFORE), _CALIBRATING))

    @property
    def estimating(self) -> Iterator[Any]:
        return itertools.islice(epoch_of(self.loader, self.options.seed, _AFTER), _ESTIMATING)

    def epoch(self, number: int, *, skip: int) -> Iterator[list[Any]]:
        """The batches of each step, but for the first `skip` steps. Raises DataError where there are too few."""
        batches = epoch_of(self.loader, self.options.seed, _EPOCHS, number)
        for index in range(self.steps):
            taken = list(itertools.islice(batches, self.options.accumulate))
            if not taken:
                raise DataError(
                    f"the loader yields {index} steps in epoch {number + 1} and {self.steps} before: give one that can "
                    "be read again and again, such as a DataLoader or a list"
                )
            if index >= skip:
                yield taken


def _length(loader: Iterable[Any], seed: int) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in epoch_of(loader, seed, _BEFORE))


@dataclass(frozen=True)
class Loop:
    """Who is asked, who is told, and where it is saved."""

    training: Training
    feed: Feed
    judge: Judge | None
    tell: Tell
    path: Path | None

    def run(self) -> fx.GraphModule:
        """Train to the end, from a checkpoint where there is one; returns the network to finish."""
        training = self.training
        if self.path is not None and self.path.exists():
            training.resume_(load(self.path, self._recipe))
        elif self._is_judged:
            training.consider(self._figure())
        is_interrupted = False
        try:
            self._epochs()
        except KeyboardInterrupt:
            is_interrupted = True
        if training.best.state:
            training.model.load_state_dict(training.best.state)
        model, figure, is_reestimated = self._reestimated()
        step = training.best.step if training.best.state else training.done
        self.tell(
            Fitted(
                step,
                training.done,
                training.schedule.total,
                figure,
                is_interrupted,
                is_reestimated,
                training.oscillations,
            )
        )
        return model

    @property
    def _is_judged(self) -> bool:
        return self.feed.validation is not None or self.judge is not None

    def _figure(self) -> float:
        return self.training.held_out(self.feed.validation or (), self.judge)

    def _epochs(self) -> None:
        steps, training = self.feed.steps, self.training
        for number in range(training.done // steps, training.schedule.total // steps):
            for batches in self.feed.epoch(number, skip=training.done - number * steps):
                loss, rate = training.step(batches)
                figure = self._checked()
                self._save()
                self.tell(Step(training.done, training.schedule.total, loss, rate, figure, training.oscillations))

    def _checked(self) -> float | None:
        """What the held-out data say, where it is their turn."""
        every = max(1, self.feed.steps // self.feed.options.checks)
        if not self._is_judged or (self.training.done % every and self.training.done != self.training.schedule.total):
            return None
        figure = self._figure()
        self.training.consider(figure)
        return figure

    def _save(self) -> None:
        every, done = self.feed.options.save_every, self.training.done
        if self.path is not None and (done % self.feed.steps == 0 or (every is not None and done % every == 0)):
            save(self.path, self._recipe, self.training.saved())

    @property
    def _recipe(self) -> dict[str, str]:
        """What must be the same for a training to go on."""
        plan = preparation_of(self.training.model).plan
        return {
            "scheme": f"{plan.names} {dict(plan.edges)}",
            "options": str(self.feed.options),
            "steps": f"{self.training.schedule.total} in epochs of {self.feed.steps}",
            "learnt from": f"labels {self.training.has_labels}, teacher {self.training.teacher is not None}",
        }

    def _reestimated(self) -> tuple[fx.GraphModule, float | None, bool]:
        """The network, with batch norms estimated anew where that is better on the held-out data; without these, where
        they did not stand still at the end, so that nothing was trained to suit them as they are."""
        training = self.training
        figure = training.best.figure if self._is_judged else None
        has_norms = bool(preparation_of(training.model).norms)
        if not has_norms or (figure is None and self.feed.options.frozen_norms > 0):
            return training.model, figure, False
        kept, before = training.model, figure
        training.model = copied(kept)
        reestimate_norms(training.model, self.feed.estimating)
        figure = self._figure() if self._is_judged else None
        if before is not None and figure is not None and not figure < before:
            training.model, figure = kept, before
        return training.model, figure, training.model is not kept
