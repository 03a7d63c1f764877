"""`pennyweight plan`: the plan and the whole size/loss frontier, before any long run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from pennyweight.cli import options as shared
from pennyweight.cli.console import cost_teller, device_of, mebibytes, put_json, set_jobs, table, trial_teller
from pennyweight.core.memory import settled_imports

if TYPE_CHECKING:
    from pennyweight.evaluate.planned import Planned
    from pennyweight.plan.frontier import Point
    from pennyweight.schemes import Scheme

# Rows of the frontier that are printed.
_ROWS = 14

_Out = Annotated[str | None, typer.Option(help="Directory for plan.json, frontier.json and frontier.svg.")]


def plan(
    model: shared.Model,
    out: _Out = None,
    size: shared.Size = None,
    bpw: shared.Bpw = None,
    max_kl: shared.MaxKl = None,
    max_loss: shared.MaxLoss = None,
    task: shared.Task = None,
    keep: shared.Keep = None,
    at: shared.At = None,
    runtime: shared.Runtime = "transformers",
    effort: shared.Effort = "normal",
    calibration: shared.Calibration = None,
    samples: shared.Samples = 128,
    length: shared.Length = 512,
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
    jobs: shared.Jobs = None,
    trust_remote_code: shared.Trust = False,
    as_json: shared.Json = False,
) -> None:
    """Find the best plan for a size or a loss, and all others.

    Nothing is quantized, but to judge a budget of loss. What each scheme costs each weight is kept beside the model:
    another budget takes seconds. Give the plan to `quantize --plan`, edited or not.
    """
    import time

    with settled_imports():
        from pennyweight.evaluate.planned import planned
        from pennyweight.pipeline.options import Options
        from pennyweight.pipeline.run import check_target
        from pennyweight.plan.budget import parse_budget
        from pennyweight.report.plan_directory import write_plan

    set_jobs(jobs)
    started = time.perf_counter()
    options = Options(
        budget=parse_budget(size=size, bpw=bpw, max_kl=max_kl, max_loss=max_loss, task=task),
        keep=tuple(keep or ()), at=tuple(at or ()), runtime=runtime, effort=effort, calibration=calibration,  # type: ignore[arg-type]
        samples=samples, length=length, seed=seed, device=device_of(device), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    place = None if out is None else check_target(out)
    found = planned(model, options, tell=cost_teller(), tell_trial=trial_teller())
    files = [] if place is None else write_plan(place, found)
    seconds = round(time.perf_counter() - started, 3)
    if as_json:
        put_json({**summary(found), "out": out, "files": files, "seconds": seconds})
        return
    _print(found)
    for name in files:
        print(f"{out}/{name}")


def summary(found: Planned) -> dict[str, object]:
    """What --json prints of a plan."""
    problem, budget = found.problem, found.draft.options.budget
    points = problem.frontier.points
    known: dict[str, object] = {
        "budget": None if budget is None else {budget.kind: budget.value},
        "sites": len(found.draft.sites),
        "smallest_bytes": points[0].size_bytes,
        "largest_bytes": points[-1].size_bytes,
        "frontier": [
            {"size_bytes": point.size_bytes, "bpw": problem.frontier.bpw(point), "predicted_loss": point.cost}
            for point in points
        ],
    }
    if found.plan is not None:
        size, cost = problem.of(found.plan)
        known |= {"size_bytes": size, "bpw": 8 * size / problem.weights, "predicted_loss": cost}
        known |= {"plan": found.plan.names, "evidence": found.evidence}
    return known


def _print(found: Planned) -> None:
    frontier = found.problem.frontier
    print("the best plans (sizes of all tensors; weights at each width, in per cent)")
    step = max(1, -(-len(frontier.points) // _ROWS))
    points = [*frontier.points[:-1:step], frontier.points[-1]]
    widths = sorted({_width(scheme) for point in points for scheme in point.schemes}, key=lambda name: name.zfill(5))
    rows = [_row(found, point, widths) for point in points]
    table(["size", "bpw", "predicted loss", *widths], rows)
    if found.plan is None:
        return
    size, cost = found.problem.of(found.plan)
    bpw = 8 * size / found.problem.weights
    print(f"{found.draft.options.budget}: {mebibytes(size)} of tensors, {bpw:.3f} bpw, predicted loss {cost:.3g}")
    kinds: dict[str, Counter[str]] = {}
    for site, name in found.plan.names.items():
        kinds.setdefault(site.rsplit(".", 1)[-1], Counter())[name] += 1
    for kind, schemes in kinds.items():
        print(f"  {kind}: {', '.join(f'{count} x {name}' for name, count in schemes.most_common())}")


def _row(found: Planned, point: Point, widths: list[str]) -> list[str]:
    frontier, sites = found.problem.frontier, found.draft.sites
    weights: Counter[str] = Counter()
    for members, scheme in zip(frontier.sites, point.schemes, strict=True):
        weights[_width(scheme)] += sum(sites[name].weights for name in members)
    shares = [f"{100 * weights[width] / weights.total():.0f}" if weights[width] else "" for width in widths]
    return [mebibytes(point.size_bytes), f"{frontier.bpw(point) or 0:.2f}", f"{point.cost:.3g}", *shares]


def _width(scheme: Scheme | None) -> str:
    return "float" if scheme is None else scheme.element.name
