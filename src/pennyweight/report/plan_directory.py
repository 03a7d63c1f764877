"""The directory that `plan` leaves: the plan, the frontier, and a picture of both."""

from __future__ import annotations

from pathlib import Path

from pennyweight.core.errors import MissingExtraError
from pennyweight.core.files import write_text
from pennyweight.evaluate.planned import Planned
from pennyweight.plan.frontier_file import write_frontier
from pennyweight.plan.plan_file import write_plan_file
from pennyweight.report.frontier_plot import Mark, frontier_svg

PLAN, FRONTIER, PLOT = "plan.json", "frontier.json", "frontier.svg"


def write_plan(out: Path, found: Planned) -> list[str]:
    """Write what was found into the directory `out`; returns the names of its files. Without matplotlib there is no
    picture."""
    out.mkdir(exist_ok=True)
    write_frontier(out / FRONTIER, found.problem.frontier)
    names = [FRONTIER]
    if found.plan is not None:
        _write_plan_file(out / PLAN, found)
        names.insert(0, PLAN)
    try:
        write_text(out / PLOT, _plot(found))
    except MissingExtraError:
        return names
    return [*names, PLOT]


def _write_plan_file(path: Path, found: Planned) -> None:
    assert found.plan is not None
    options, budget = found.draft.options, found.draft.options.budget
    size, cost = found.problem.of(found.plan)
    write_plan_file(
        path,
        {site: found.plan.schemes.get(site) for site in found.draft.sites},
        sites=list(found.draft.sites),
        model=found.draft.model_name,
        runtime=options.runtime,
        budget=None if budget is None else {budget.kind: budget.value},
        size_bytes=size,
        predicted_loss=cost,
    )


def _plot(found: Planned) -> str:
    chosen = None if found.plan is None else Mark("chosen", *found.problem.of(found.plan))
    trials = () if found.found is None else found.found.trials
    return frontier_svg(
        found.problem.frontier,
        title=f"{found.draft.model_name} for {found.draft.options.runtime}: loss and size of all tensors",
        chosen=chosen,
        uniform=[Mark(name, size, cost) for name, size, cost in found.problem.uniform],
        measured=[Mark("", trial.size_bytes, trial.loss) for trial in trials],
    )
