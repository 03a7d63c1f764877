"""Whether a budget in points of a task holds: many splits of its items into those that choose and those that judge.

    python -m benchmarks.task_budgets [--items 2000] [--limits 1,2] [--every 8] [--data DIR] [--out FILE]

The task is made of text: after 16 words of a book, the true next four among those of three other places. The shipped
model learnt from these books. Every so many plans of the frontier are made, with `--effort fast`, and answer every
item. Then, split by split, the rule of `pennyweight.evaluate.loss_budget` is applied to half of the items and its plan
judged on the other half: how often more than the limit was lost there, and how much larger the plan is than the first
of them that meets it there.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.results_file import ROOT, cache, circumstances, heading, note, save, table
from benchmarks.subjects import DEMO
from benchmarks.third_model import unseen_text
from pennyweight.evaluate.tasks.accuracy import accuracy_lost
from pennyweight.evaluate.tasks.base import Outcome
from pennyweight.evaluate.tasks.exam import Exam
from pennyweight.evaluate.tasks.file import read_task
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.measuring import Measuring
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.planning import problem_of
from pennyweight.pipeline.prepare import drafted
from pennyweight.pipeline.run import quantize
from pennyweight.plan.plan_file import PlanEntries

SPLITS = 20
# Rates are told over so many, which share the same items.
_MANY = 400
_CONTEXT, _ENDING, _CHOICES = 16, 4, 4
# Nats: plans that are predicted to lose less answer as the original does.
_LEAST = 1e-4
# Of each book.
_CHARACTERS = 350_000


def make_task(path: Path, words: Sequence[str], *, items: int, seed: int = 0) -> None:
    """A file of items: which of four pieces of the text comes next."""
    chosen = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for start in chosen.sample(range(len(words) - _CONTEXT - _ENDING), items):
            others = (chosen.randrange(len(words) - _ENDING) for _ in range(_CHOICES - 1))
            choices = [" " + " ".join(words[place : place + _ENDING]) for place in (start + _CONTEXT, *others)]
            order = chosen.sample(range(_CHOICES), _CHOICES)
            item = {"context": " ".join(words[start : start + _CONTEXT]), "choices": [choices[one] for one in order],
                    "answer": order.index(0)}  # fmt: skip
            file.write(json.dumps(item) + "\n")


@dataclass(frozen=True)
class Judged:
    """A plan of the frontier, and what it gave for each item."""

    size_bytes: int
    predicted: float
    outcomes: list[Outcome]


def judged_plans(task: Path, work: Path, *, every: int) -> tuple[list[Outcome], list[Judged]]:
    """What the original gave for each item, and the plans from small to large."""
    options = Options(effort="fast")
    draft = drafted(str(DEMO), options, None)
    exam = Exam.of(read_task(task), draft.streamed)
    before = exam.outcomes(draft.streamed)
    note(f"  the original: {exam.metrics(before)}")
    problem = problem_of(draft, Measuring(draft))
    found: list[Judged] = []
    for point in problem.frontier.points[::every]:
        out = work / "plan"
        shutil.rmtree(out, ignore_errors=True)
        entries = PlanEntries("a plan of the frontier", problem.plan(problem.frontier.schemes(point)).names)
        quantize(str(DEMO), out, replace(options, plan=entries))
        found.append(Judged(point.size_bytes, point.cost, exam.outcomes(StreamedModel(out))))
        lost = accuracy_lost(before, found[-1].outcomes)
        note(f"  {point.size_bytes:,} bytes: predicted {point.cost:.4g}, {lost}")
        if point.cost < _LEAST:
            break
    return before, found


@dataclass(frozen=True)
class Split:
    """Of one split: whether more than the limit was lost on the judging half, and how much larger the plan was."""

    violated: bool
    excess: float


def split(before: Sequence[Outcome], plans: Sequence[Judged], limit: float, seed: int) -> Split | None:
    """None where no plan holds on one of the halves."""
    order = random.Random(seed).sample(range(len(before)), len(before))
    choosing, judging = order[: len(order) // 2], order[len(order) // 2 :]

    def lost(plan: Judged, items: Sequence[int]) -> Any:
        return accuracy_lost([before[item] for item in items], [plan.outcomes[item] for item in items])

    chosen = next((plan for plan in plans if lost(plan, choosing).upper <= limit), None)
    first = next((plan for plan in plans if lost(plan, judging).points <= limit), None)
    if chosen is None or first is None:
        return None
    return Split(lost(chosen, judging).points > limit, chosen.size_bytes / first.size_bytes - 1)


@dataclass(frozen=True)
class Outcomes:
    """Of one limit, in points: violations in the splits that are shown and their rate in many; how many had no plan."""

    limit: float
    items: int
    violations: int
    rate: float
    unmet: int
    excess: float
    most: float


def outcome(before: Sequence[Outcome], plans: Sequence[Judged], limit: float) -> Outcomes:
    """What the rule does over the splits."""
    splits = [split(before, plans, limit, seed) for seed in range(_MANY)]
    shown = [one for one in splits[:SPLITS] if one is not None]
    excess = [one.excess for one in shown] or [math.nan]
    return Outcomes(
        limit, len(before) // 2,
        violations=sum(one.violated for one in shown),
        rate=sum(one.violated for one in splits if one is not None) / _MANY,
        unmet=SPLITS - len(shown),
        excess=math.fsum(excess) / len(excess),
        most=max(excess),
    )  # fmt: skip


def markdown(facts: dict[str, Any], found: Sequence[Outcomes]) -> str:
    """The result to read."""
    head = ["budget", "items each", "violations", "rate", "unmet", "larger by, mean", "at most"]
    rows = [
        [f"--max-loss {one.limit:g} --task", f"{one.items:,}", f"{one.violations} of {SPLITS}",
         f"{100 * one.rate:.1f} %", str(one.unmet), f"{100 * one.excess:.1f} %", f"{100 * one.most:.1f} %"]
        for one in found
    ]  # fmt: skip
    notes = [
        "",
        "- violations: splits in which more than the limit was lost on the judging half; one of twenty is allowed. "
        f"rate: of {_MANY} splits.",
        "- larger by: bytes of tensors over those of the first plan of the frontier that meets the limit there.",
        "",
    ]
    return "\n".join([heading("Budgets in points of a task", facts), table(head, rows), *notes])


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.task_budgets", description="Whether points are kept.")
    parser.add_argument("--items", type=int, default=2000, help="half choose, half judge (default: %(default)s)")
    parser.add_argument("--limits", default="1,2", help="points, with commas between (default: %(default)s)")
    parser.add_argument(
        "--every", type=int, default=8, help="plans of the frontier that are made (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="texts not ours")
    parser.add_argument("--out", type=Path, help="JSON to write, .md beside it")
    arguments = parser.parse_args()
    facts = circumstances("benchmarks.task_budgets")
    with tempfile.TemporaryDirectory(dir=cache(), prefix="tasks-") as directory:
        task = Path(directory) / "task.jsonl"
        words = unseen_text(arguments.data, characters=_CHARACTERS).split()
        make_task(task, words, items=arguments.items)
        before, plans = judged_plans(task, Path(directory), every=arguments.every)
    found = [outcome(before, plans, float(limit)) for limit in arguments.limits.split(",")]
    sizes = [{"size_bytes": plan.size_bytes, "predicted": plan.predicted} for plan in plans]
    save(
        "task_budgets",
        {**facts, "outcomes": [asdict(one) for one in found], "plans": sizes},
        markdown(facts, found),
        out=arguments.out,
    )


if __name__ == "__main__":
    main()
