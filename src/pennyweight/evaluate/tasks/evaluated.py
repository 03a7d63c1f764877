"""A smaller model and its original on the items of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pennyweight.evaluate.compare import Sizes, check_pair
from pennyweight.evaluate.tasks.exam import Exam
from pennyweight.evaluate.tasks.file import read_task
from pennyweight.models.hub import resolve
from pennyweight.models.streamed import StreamedModel


@dataclass(frozen=True)
class TaskEvaluation:
    """What was lost of a task, in points.

    kind, items          of the task
    metrics, reference   of this model and of the original, by name; the first is what the next three are of
    lost, stderr, upper  original minus this on the same items, its standard error, its upper bound of 99 %
    """

    kind: str
    items: int
    metrics: Mapping[str, float]
    reference: Mapping[str, float]
    lost: float
    stderr: float
    upper: float
    sizes: Sizes


def evaluate_task(
    artefact: str, *, against: str, path: Path, device: str = "cpu", trust_remote_code: bool = False
) -> TaskEvaluation:
    """The model in `artefact` and the original `against` on the items in the file `path`.

    Both are run block by block in float32, so neither has to fit in memory. Raises DataError for a file that is no
    task, ModelError where the two do not belong together or cannot be asked it.
    """
    task = read_task(path)
    candidate, original = (
        StreamedModel(resolve(model), trust_remote_code=trust_remote_code, device=device)
        for model in (artefact, against)
    )
    check_pair(candidate, original)
    exam = Exam.of(task, original)
    before, after = (exam.outcomes(model) for model in (original, candidate))
    lost = task.metric.lost(task.items, before, after)
    return TaskEvaluation(
        kind=task.metric.name,
        items=len(task.items),
        metrics=exam.metrics(after),
        reference=exam.metrics(before),
        lost=lost.points,
        stderr=lost.stderr,
        upper=lost.upper,
        sizes=Sizes.of(candidate, original),
    )
