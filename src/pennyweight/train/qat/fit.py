"""A network and a loader -> its codes, trained: for those without a loop of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import fx, nn

from pennyweight.core.errors import UsageError
from pennyweight.models.network import QuantizedNetwork
from pennyweight.plan.plan import Plan
from pennyweight.schemes.activation import NetworkScheme
from pennyweight.train.qat.finish import finish
from pennyweight.train.qat.loop import Feed, Fitted, Judge, Loop, Tell
from pennyweight.train.qat.options import FitOptions, QatOptions
from pennyweight.train.qat.prepare import Trainable, prepare
from pennyweight.train.qat.prepared import preparation_of
from pennyweight.train.qat.randomness import kept_randomness
from pennyweight.train.qat.schedule import Schedule
from pennyweight.train.qat.training import Step, Training

# The float network itself, another module, or labels alone.
Teacher = Literal["self"] | nn.Module | None


def tell_nobody(event: Step | Fitted) -> None:
    """For callers that do not follow the steps."""


def fit(
    net: Trainable,
    scheme: str | NetworkScheme | Plan | None,
    loader: Iterable[Any],
    *,
    epochs: int = 10,
    validation: Iterable[Any] | None = None,
    judge: Judge | None = None,
    teacher: Teacher = "self",
    labels: bool = True,
    example: Any = None,
    calibration: Iterable[Any] | None = None,
    keep: Sequence[str] = (),
    at: Sequence[str] = (),
    options: FitOptions = FitOptions(),
    preparation: QatOptions = QatOptions(),
    checkpoint: Path | str | None = None,
    tell: Tell = tell_nobody,
) -> QuantizedNetwork:
    """Prepare `net`, train it on `loader`, and finish: its codes after the best step.

    net, scheme, example, calibration, keep, at, preparation   as `prepare` takes them; without `calibration` ranges
                 start from the first batches of `loader`
    loader       batches (inputs, labels), or mappings with "labels"; read once an epoch
    validation   held-out batches that decide which step is kept; without them it is the last
    judge        what decides in place of the loss on `validation`: a figure of the module, higher is better
    teacher      what is learnt from beside labels: "self" is the float network, None nothing
    labels       False: the teacher alone is learnt from
    checkpoint   a file to which the training is saved, and from which it goes on if it is there, to the same end
    tell         called after each step, and at the end

    The keyboard (Ctrl-C) ends training early, with the best so far. The generators of torch, numpy and Python are left
    as they were. Raises UsageError, ModelError, DataError, TrainingError where the loss is not finite, CheckpointError.
    """
    if epochs < 1:
        raise UsageError(f"epochs={epochs}: give 1 or more")
    if teacher is None and not labels:
        raise UsageError("neither labels nor a teacher: give one of them, there is nothing to learn from")
    with kept_randomness():
        feed = Feed.of(loader, validation, options)
        given = feed.calibrating if calibration is None else calibration
        model = prepare(net, scheme, example=example, calibration=given, keep=keep, at=at, options=preparation)
        with _teaching(teacher, model) as taught:
            training = Training(model, taught, labels, options, Schedule(options, epochs * feed.steps))
            path = None if checkpoint is None else Path(checkpoint)
            return finish(Loop(training, feed, judge, tell, path).run())


@contextmanager
def _teaching(teacher: Teacher, model: fx.GraphModule) -> Iterator[Callable[..., Any] | None]:
    """The teacher as a function, in eval mode; a module of the user's is in its own mode again afterwards."""
    if teacher is None:
        yield None
        return
    module = preparation_of(model).network.copied().graph if isinstance(teacher, str) else teacher
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, mode in modes:
            part.training = mode
