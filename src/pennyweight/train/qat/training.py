"""One training of a prepared network, step by step: what changes, and how it is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.core.errors import DataError, TrainingError
from pennyweight.models.network.network import Inputs
from pennyweight.train.qat.batches import checked, device_of, moved
from pennyweight.train.qat.groups import optimizer_of
from pennyweight.train.qat.norms import freeze_norms
from pennyweight.train.qat.objective import logits_of
from pennyweight.train.qat.options import FitOptions
from pennyweight.train.qat.oscillation import Oscillations, dampening, follow_codes
from pennyweight.train.qat.prepared import Preparation, preparation_of
from pennyweight.train.qat.randomness import own_stream
from pennyweight.train.qat.schedule import Schedule

State = dict[str, Any]
# Of the streams of random numbers: those that a step draws.
_STEPS = 1


@dataclass(frozen=True)
class Step:
    """Told after each step: how many are done of how many, the mean loss of its batches, the rate; what the held-out
    data say where they were asked; shares of weights that oscillate and that are frozen."""

    done: int
    total: int
    loss: float
    rate: float
    held_out: float | None
    oscillations: Oscillations


@dataclass
class Best:
    """What the held-out data liked best so far: their figure (lower is better), after which step, and the tensors."""

    figure: float = math.inf
    step: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Training:
    """model      the prepared network
    teacher    what it learns from beside labels, in eval mode; None for labels alone
    has_labels whether batches have labels
    done       steps that were made
    """

    model: fx.GraphModule
    teacher: Callable[..., Any] | None
    has_labels: bool
    options: FitOptions
    schedule: Schedule
    optimizer: torch.optim.Optimizer = field(init=False)
    best: Best = field(default_factory=Best)
    done: int = 0
    oscillations: Oscillations = field(default_factory=lambda: Oscillations(0.0, 0.0))

    def __post_init__(self) -> None:
        bits = min((scheme.element.bits for scheme in self._preparation.plan.schemes.values()), default=8)
        options = self.options
        self.optimizer = optimizer_of(
            self.model,
            rate=options.rate_at(bits),
            decay=options.decay_at(bits),
            momentum=options.momentum,
            optimizer=options.optimizer,
        )
        for group in self.optimizer.param_groups:
            group["highest"] = group["lr"]

    @property
    def _preparation(self) -> Preparation:
        return preparation_of(self.model)

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def step(self, batches: list[Any]) -> tuple[float, float]:
        """One step of the optimizer from a few batches; returns their mean loss and the rate."""
        share = self.schedule.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * share
        self.model.train()
        freeze_norms(self.model, is_frozen=self.schedule.is_norm_frozen(self.done))
        with own_stream(self.options.seed, _STEPS, self.done):
            loss = math.fsum(self._backward(batch, len(batches)) for batch in batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.oscillations = follow_codes(self.model, freeze_above=self.schedule.freeze_above(self.done))
        self.done += 1
        return loss, float(self.optimizer.param_groups[0]["lr"])

    def _backward(self, batch: Any, count: int) -> float:
        """Add the gradients of one of `count` batches; returns its share of the loss."""
        loss = self._loss(batch)
        factor = self.schedule.dampening(self.done)
        if factor:
            loss = loss + factor * dampening(self.model)
        if not math.isfinite(float(loss.detach())):
            raise TrainingError(f"step {self.done + 1}: the loss is {float(loss.detach())}; {self._culprit()}")
        torch.autograd.backward(loss / count)
        return float(loss.detach()) / count

    def _loss(self, batch: Any) -> Tensor:
        place = f"batch of step {self.done + 1}"
        found = checked(self._preparation.network, batch, place=place, needs_labels=self.has_labels)
        given = moved(found.inputs, self.device)
        labels = found.labels.to(self.device) if self.has_labels else None
        with self._autocast():
            outputs = logits_of(self.model(*given.args, **given.kwargs))
        return self.options.objective.loss(outputs, self._taught(given), labels)

    def _taught(self, given: Inputs) -> Tensor | None:
        if self.teacher is None:
            return None
        with torch.no_grad(), self._autocast():
            return logits_of(self.teacher(*given.args, **given.kwargs))

    def _autocast(self) -> Any:
        kind = self.options.autocast
        return nullcontext() if kind is None else torch.autocast(self.device.type, kind)

    def _culprit(self) -> str:
        """What is not finite, and what to do."""
        rate = self.optimizer.param_groups[0]["highest"]
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                return f"{name} has become NaN or infinite: lower the rate ({rate:g}), or warm up longer"
        return f"weights and inputs are finite: lower the rate ({rate:g}), or look at the labels and the teacher"

    @torch.no_grad()
    def held_out(self, batches: Iterable[Any], judge: Callable[[nn.Module], float] | None) -> float:
        """The figure of the network as it will be deployed, lower is better: the mean loss, or what `judge` says,
        negated. Raises DataError where there are no batches."""
        self.model.eval()
        if judge is not None:
            return -float(judge(self.model))
        with own_stream(self.options.seed, _STEPS, self.done):
            losses = [float(self._loss(batch)) for batch in batches]
        if not losses:
            raise DataError("validation yields no batches: give some, in a loader that can be read again, or None")
        return math.fsum(losses) / len(losses)

    def consider(self, figure: float) -> None:
        """Remember the tensors as they are if `figure` is the best so far."""
        if figure < self.best.figure:
            state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self.best = Best(figure, self.done, state)

    def saved(self) -> State:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "best": vars(self.best),
        }

    def resume_(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = int(state["done"])
        self.best = Best(**state["best"])
