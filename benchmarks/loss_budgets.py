"""Whether a budget of loss holds: many splits of one text into windows that choose a plan and windows that judge it.

    python -m benchmarks.loss_budgets [--models demo,stories260K,third] [--tokens 24576,49152] [--data DIR] [--out FILE]

Every so many plans of the frontier are made, with `--effort fast`, and looked at on a few windows; then all that are
near the limit, and the loss of each is measured on every window that it was not calibrated on. Then, split by split,
the rule of `pennyweight.evaluate.loss_budget` (the smallest plan whose upper bound holds) is applied to some windows
and its plan judged on as many others: how often the mean there is above the limit, and how much larger the plan is than
the first of the frontier that meets it there. Beside the bound of 2.33 standard errors that is in force stand narrower
ones, and a seer: it knows the mean over all windows, and leaves the 1.645 standard errors of the judging windows alone,
with which 95 % of them hold. No rule that looks at fewer windows can promise that with smaller plans.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results_file import ROOT, cache, circumstances, heading, note, options, save, table
from benchmarks.subjects import DEMO
from benchmarks.third_model import STEPS, make, unseen_text
from pennyweight.evaluate.compare import Reference, WindowScores
from pennyweight.evaluate.judges import bounded, unseen_windows
from pennyweight.models.streamed import StreamedModel
from pennyweight.models.text import digest
from pennyweight.pipeline.measuring import Measuring
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.planning import problem_of
from pennyweight.pipeline.prepare import drafted
from pennyweight.pipeline.run import quantize
from pennyweight.plan.budget import Budget
from pennyweight.plan.plan_file import PlanEntries

SPLITS = 20
# Rates are told over so many, which share the same windows.
_MANY = 400
_HUNDREDTH = (Budget("max-kl", 0.01), Budget("max-loss", 0.01))
# All plans of the third, which has learnt little, lose less than a hundredth.
LIMITS = {
    "demo": _HUNDREDTH,
    "stories260K": _HUNDREDTH,
    "third": (Budget("max-kl", 0.005), Budget("max-loss", 0.005)),
}
_LENGTH = 512
# Of each book.
_CHARACTERS = 500_000
# Plans whose predicted loss is between these multiples of the limit are made, every so many, and looked at on so many
# tokens.
_LEAST, _MOST, _STRIDE = 0.2, 8.0, 8
_LOOK = 49_152
# Then all those whose loss, going by these, is so far from the limit at most, below and above, with _LOOK tokens that
# choose; with more, which tell more, nearer ones.
_BELOW, _ABOVE = 0.5, 0.3
# Standard errors of the rules; a seer's last.
_IN_FORCE, _SEER = "2.33", "seer"
RULES = {_IN_FORCE: 2.33, "2": 2.0, "1.645": 1.645, _SEER: 1.645}


@dataclass(frozen=True)
class Text:
    """A model, and the text that chooses and judges its plans."""

    name: str
    path: Path
    calibration: str


def demo(data: Path, work: Path) -> Text:
    """The shipped model on three of the books that it learnt from; the built-in text, part of them, is too short."""
    return Text("demo", DEMO, _books(data, work))


def stories(data: Path, work: Path) -> Text:
    """stories260K on the TinyStories validation stories."""
    return Text("stories260K", data / "models" / "stories260K", str(data / "text" / "tinystories-valid.txt"))


def third(data: Path, work: Path) -> Text:
    """A small Qwen3 on the half of the books that it never saw; made where it is not there yet."""
    path = cache() / "third-model"
    if not (path / "model.safetensors").exists():
        shutil.rmtree(path, ignore_errors=True)
        make(path, data, steps=STEPS)
    return Text("third", path, _books(data, work))


def _books(data: Path, work: Path) -> str:
    path = work / "books.txt"
    path.write_text(unseen_text(data, characters=_CHARACTERS), encoding="utf-8")
    return str(path)


MODELS: dict[str, Callable[[Path, Path], Text]] = {"demo": demo, "stories260K": stories, "third": third}


@dataclass(frozen=True)
class Judged:
    """A plan of the frontier, and its scores window by window."""

    size_bytes: int
    predicted: float
    scores: list[WindowScores]


@dataclass(frozen=True)
class _Kept:
    """Plans that were judged before, by size, in a file of benchmarks/.cache: for the same model, windows and code."""

    file: Path
    plans: dict[int, Judged]

    @classmethod
    def of(cls, model: Path, windows: Sequence[Tensor]) -> _Kept:
        code = sorted((ROOT / "src" / "pennyweight").rglob("*.py"))
        parts = [path.read_bytes() for path in (*sorted(model.glob("*.safetensors")), *code)]
        key = hashlib.sha256(b"".join([*parts, digest(windows).encode()])).hexdigest()[:16]
        file = cache("loss-budgets") / f"{key}.json"
        read = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        plans = [
            Judged(one["size_bytes"], one["predicted"], [WindowScores(**score) for score in one["scores"]])
            for one in read
        ]
        return cls(file, {plan.size_bytes: plan for plan in plans})

    def add(self, plan: Judged) -> None:
        self.plans[plan.size_bytes] = plan
        self.file.write_text(json.dumps([asdict(one) for one in self.plans.values()]), encoding="utf-8")


def judged_plans(text: Text, tokens: Sequence[int], work: Path) -> list[Judged]:
    """The plans near the limits, from small to large, on twice as many tokens as the most that are to choose."""
    options = Options(calibration=text.calibration, length=_LENGTH, effort="fast")
    draft = drafted(str(text.path), options, None)
    problem = problem_of(draft, Measuring(draft))
    unseen = unseen_windows(draft)
    order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))
    windows = [unseen[index] for index in order[: 2 * max(tokens) // _LENGTH].tolist()]
    note(f"  {len(windows) * _LENGTH:,} tokens of {len(unseen) * _LENGTH:,} that no plan is calibrated on")
    points = problem.frontier.points
    limits = LIMITS[text.name]
    least, most = (pick(limit.value for limit in limits) for pick in (min, max))

    def judged(index: int, kept: _Kept, original: Reference) -> Judged:
        point, out = points[index], work / "plan"
        if point.size_bytes not in kept.plans:
            shutil.rmtree(out, ignore_errors=True)
            entries = PlanEntries("a plan of the frontier", problem.plan(problem.frontier.schemes(point)).names)
            quantize(str(text.path), out, replace(options, plan=entries))
            kept.add(Judged(point.size_bytes, point.cost, original.compare(StreamedModel(out))))
        plan = kept.plans[point.size_bytes]
        seen = "; ".join(f"{limit}: {bounded(plan.scores, limit)[0]:.4g}" for limit in limits)
        note(f"  {point.size_bytes:,} bytes: predicted {point.cost:.4g}, {seen}")
        return plan

    few = windows[: _LOOK // _LENGTH]
    looked = _Kept.of(text.path, few)
    within = [index for index, point in enumerate(points) if _LEAST * least <= point.cost <= _MOST * most]
    coarse = sorted({*within[::_STRIDE], within[-1]})
    original = Reference(draft.streamed, few)
    looks = [judged(index, looked, original) for index in coarse]
    far = math.sqrt(_LOOK / min(tokens))
    near: list[int] = []
    ends = [*zip(coarse, looks, strict=True), (coarse[-1] + 1, looks[-1])]
    for (before, first), (after, last) in pairwise(ends):
        for index in range(before, after):
            share = (index - before) / (after - before)
            if any(_is_near(first, last, share, limit, far) for limit in limits):
                near.append(index)
    note(f"  {len(near)} plans near the limits")
    original, kept = Reference(draft.streamed, windows), _Kept.of(text.path, windows)
    return [judged(index, kept, original) for index in near]


def _is_near(before: Judged, after: Judged, share: float, limit: Budget, far: float) -> bool:
    """Whether a plan that far from `before` to `after` may be taken for the first that holds."""
    more, less = (max(bounded(plan.scores, limit)[0] / limit.value, 1e-6) for plan in (before, after))
    return 1 - _BELOW * far <= more * (less / more) ** share <= 1 + _ABOVE * far


@dataclass(frozen=True)
class Outcome:
    """Of one limit and one rule, with so many tokens to choose on and as many to judge on.

    violations   splits in which the loss on the judging windows was above the limit
    rate         share of them in many splits
    unmet        splits in which no plan held
    excess       how much larger the plan was than the first that meets the limit there: in the mean, and at most
    """

    model: str
    budget: str
    rule: str
    tokens: int
    splits: int
    violations: int
    rate: float
    unmet: int
    excess: tuple[float, float]


def outcome(model: str, plans: Sequence[Judged], budget: Budget, rule: str, tokens: int) -> Outcome:
    """What the rule does over the splits."""
    splits = [_split(plans, budget, rule, tokens // _LENGTH, seed) for seed in range(_MANY)]
    shown = [split for split in splits[:SPLITS] if split is not None]
    rate = sum(split[0] for split in splits if split is not None) / len(splits)
    excess = [split[1] for split in shown] or [math.nan]
    return Outcome(
        model, str(budget), rule, tokens, SPLITS,
        violations=sum(split[0] for split in shown),
        rate=rate,
        unmet=SPLITS - len(shown),
        excess=(math.fsum(excess) / len(excess), max(excess)),
    )  # fmt: skip


def _split(plans: Sequence[Judged], budget: Budget, rule: str, count: int, seed: int) -> tuple[bool, float] | None:
    """Whether the plan that is chosen is above the limit on the judging windows, and how much larger it is than the
    first that is not; None where no plan holds."""
    windows = len(plans[0].scores)
    order = random.Random(seed).sample(range(windows), 2 * count)
    choosing, judging = order[:count], order[count:]

    def upper(plan: Judged) -> float:
        if rule == _SEER:
            loss, above = bounded(_some(plan, judging), budget, errors=RULES[rule])
            return bounded(plan.scores, budget)[0] + above - loss
        return bounded(_some(plan, choosing), budget, errors=RULES[rule])[1]

    def judged(plan: Judged) -> float:
        return bounded(_some(plan, judging), budget)[0]

    chosen = _first(plans, lambda plan: upper(plan) <= budget.value)
    first = _first(plans, lambda plan: judged(plan) <= budget.value)
    if chosen is None or first is None:
        return None
    return judged(chosen) > budget.value, chosen.size_bytes / first.size_bytes - 1


def _first(plans: Sequence[Judged], holds: Callable[[Judged], bool]) -> Judged | None:
    return next((plan for plan in plans if holds(plan)), None)


def _some(plan: Judged, windows: Sequence[int]) -> list[WindowScores]:
    return [plan.scores[window] for window in windows]


def markdown(facts: dict[str, Any], found: Sequence[Outcome]) -> str:
    """The result to read."""
    head = ["model", "budget", "tokens each", "bound", "violations", "rate", "unmet", "larger by, mean", "at most"]
    rows = [
        [one.model, one.budget, f"{one.tokens:,}", f"{one.rule} se" if one.rule != _SEER else _SEER,
         f"{one.violations} of {one.splits}", f"{100 * one.rate:.1f} %", str(one.unmet),
         f"{100 * one.excess[0]:.1f} %", f"{100 * one.excess[1]:.1f} %"]
        for one in found
    ]  # fmt: skip
    notes = [
        "",
        f"- bound: mean + so many standard errors; {_IN_FORCE} is in force. {_SEER}: knows the mean over all windows, "
        "and adds 1.645 standard errors of the judging ones.",
        "- violations: splits in which the loss on the judging windows is above the limit; one of twenty is allowed. "
        f"rate: of {_MANY} splits.",
        "- larger by: bytes of tensors over those of the first plan of the frontier that meets the limit there; 3 % "
        "is allowed.",
        "",
    ]
    return "\n".join([heading("Budgets of loss", facts), table(head, rows), *notes])


def main() -> None:
    """Measure, print, save."""
    parser = options("loss_budgets", "Whether a loss is kept.", MODELS)
    parser.add_argument("--tokens", default="24576,49152", help="that choose, as many judge (default: %(default)s)")
    arguments = parser.parse_args()
    facts = circumstances("benchmarks.loss_budgets")
    tokens = [int(number) for number in arguments.tokens.split(",")]
    found: list[Outcome] = []
    for name in arguments.models.split(","):
        note(name)
        with tempfile.TemporaryDirectory(dir=cache(), prefix="budgets-") as directory:
            plans = judged_plans(MODELS[name](arguments.data, Path(directory)), tokens, Path(directory))
        found += [
            outcome(name, plans, limit, rule, number) for limit in LIMITS[name] for number in tokens for rule in RULES
        ]
    save("loss_budgets", {**facts, "outcomes": found}, markdown(facts, found), out=arguments.out)


if __name__ == "__main__":
    main()
