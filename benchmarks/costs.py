"""Which cost ranks sites and schemes like the loss itself, and what each takes.

    python -m benchmarks.costs [--models demo,stories260K,minilm] [--windows N] [--data DIR] [--out FILE]

Every site by itself is a group. `direct` is the truth: the loss of the model with that site alone in the scheme. Beside
it stands each cost's rank correlation with it (Spearman), over all pairs of site and scheme, which any cost gets right
that sees fewer bits, and over the sites in one scheme, which is what a plan needs. All see the same windows.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.results_file import cache, circumstances, heading, note, options, save, table
from benchmarks.subjects import SUBJECTS, Subject
from pennyweight.core.registry import find
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.windows import windows_of
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import Scheme, parse_scheme
from pennyweight.solvers.nearest import Nearest

TRUTH = "direct"
COSTS = ("hessian", "fisher", "linearity", TRUTH)
_GROUPS = ("int2-g64", "int3-g128", "int4-g128", "int6-g128", "int8-g128")
_CHANNELS = ("int2-channel", "int3-channel", "int4-channel", "int6-channel", "int8-channel")
SCHEMES = {"demo": _GROUPS, "stories260K": _CHANNELS, "all-MiniLM-L6-v2": _GROUPS}
# Tokens of each model, unless --windows says otherwise.
_TOKENS = 4096


@dataclass(frozen=True)
class Ranked:
    """One cost of one model.

    overall, at     rank correlation with the truth over all pairs, and over the sites in each scheme
    factor, spread  exp of the mean, and the standard deviation, of log(cost / truth), over all pairs
    values          site -> costs, in the order of the schemes
    """

    model: str
    cost: str
    tokens: int
    seconds: float
    overall: float
    at: dict[str, float]
    factor: float
    spread: float
    values: dict[str, list[float]]


def measure(subject: Subject, *, windows: int | None, work: Path) -> list[Ranked]:
    """All costs of one model."""
    model = StreamedModel(subject.path)
    count = windows or _TOKENS // subject.length
    batches = text.batches(windows_of(model, subject.calibration, length=subject.length, count=count))
    schemes = [parse_scheme(name).with_scale_dtype(_scale_dtype(model)) for name in SCHEMES[subject.name]]
    groups = [Candidates((site.name,), tuple(schemes)) for site in model.sites]
    found: dict[str, tuple[float, list[list[float]]]] = {}
    for name in COSTS:
        begun = time.perf_counter()
        costs = find("pipeline.costs", name).measure(
            model, batches, groups, solver=Nearest(), seed=0, scratch=work / "kept"
        )
        found[name] = time.perf_counter() - begun, costs
        note(f"  {subject.name} {name}: {found[name][0]:.1f} s")
    tokens = sum(batch.numel() for batch in batches)
    return [
        _ranked(subject, name, tokens, seconds, groups, schemes, costs, found[TRUTH][1])
        for name, (seconds, costs) in found.items()
    ]


def _scale_dtype(model: StreamedModel) -> torch.dtype:
    return model.checkpoint.tensors[model.sites[0].tensor].dtype


def _ranked(
    subject: Subject,
    name: str,
    tokens: int,
    seconds: float,
    groups: Sequence[Candidates],
    schemes: Sequence[Scheme],
    costs: Sequence[Sequence[float]],
    truth: Sequence[Sequence[float]],
) -> Ranked:
    by_scheme = zip(SCHEMES[subject.name], zip(*costs, strict=True), zip(*truth, strict=True), strict=True)
    flat, true = ([value for row in rows for value in row] for rows in (costs, truth))
    ratios = torch.tensor([math.log(c / t) for c, t in zip(flat, true, strict=True) if c > 0 and t > 0])
    return Ranked(
        model=subject.name,
        cost=name,
        tokens=tokens,
        seconds=seconds,
        overall=_correlation(flat, true),
        at={scheme: _correlation(one, other) for scheme, one, other in by_scheme},
        factor=float(ratios.mean().exp()),
        spread=float(ratios.std()),
        values={group.sites[0]: list(row) for group, row in zip(groups, costs, strict=True)},
    )


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(one, other)[0])


def _markdown(found: Sequence[Ranked]) -> str:
    parts = []
    for model in dict.fromkeys(one.model for one in found):
        rows = [one for one in found if one.model == model]
        head = ["cost", "s", "all pairs", *rows[0].at, "cost / direct", "spread of its log"]
        lines = [
            [one.cost, f"{one.seconds:.1f}", f"{one.overall:.3f}", *(f"{value:.3f}" for value in one.at.values()),
             f"{one.factor:.2f}", f"{one.spread:.2f}"]
            for one in rows
        ]  # fmt: skip
        parts.append(f"## {model}, {len(rows[0].values)} sites, {rows[0].tokens:,} tokens\n\n{table(head, lines)}\n")
    return "\n".join(parts)


def main() -> None:
    """Measure, print, save."""
    parser = options("costs", "Which cost ranks like the loss.", SUBJECTS)
    parser.add_argument("--windows", type=int, help=f"of each model (default: {_TOKENS} tokens)")
    arguments = parser.parse_args()
    facts = circumstances("benchmarks.costs")
    found: list[Ranked] = []
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=cache(), prefix="costs-") as scratch:
        work = Path(scratch)
        for name in arguments.models.split(","):
            subject = SUBJECTS[name](arguments.data, work)
            if isinstance(subject, str):
                absent[name] = subject
            else:
                found += measure(subject, windows=arguments.windows, work=work)
    legend = (
        "Rank correlation (Spearman) with `direct` over all pairs of site and scheme, and over the sites in one "
        "scheme. Solver: nearest. Seconds are of all sites and schemes together.\n"
    )
    left_out = [f"- {name}: left out: {reason}" for name, reason in absent.items()]
    parts = [heading("Which cost ranks like the loss", facts), legend, _markdown(found), *left_out]
    save("costs", {**facts, "absent": absent, "costs": found}, "\n".join(parts), out=arguments.out)


if __name__ == "__main__":
    main()
