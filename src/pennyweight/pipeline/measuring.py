"""The costs that a plan is chosen by, as a run measures them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from pennyweight.core.registry import find
from pennyweight.models import text
from pennyweight.pipeline.blind_costs import BlindMeasuring
from pennyweight.pipeline.costs.base import DEFAULT_COST, Tell, tell_nobody
from pennyweight.pipeline.costs.cache import cached_costs
from pennyweight.pipeline.costs.embedding import EmbeddingCost
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.planning import Measure
from pennyweight.pipeline.windows import longest, some_windows
from pennyweight.plan.candidates import Candidates

# Windows of full length that costs are measured on, or as many tokens of shorter ones: the ranking of sites hardly
# changes with more.
_WINDOWS = 16


@dataclass(frozen=True)
class Measuring:
    """The default cost of groups of sites of `draft`, on its own calibration windows, or on the built-in text where it
    has none; kept beside the model for the next time.

    A site is rounded as the run will, or nearly: where its solver makes up for the error of one column in the next
    ones, by gptq, which leaves much less of the error of some sites than of others.
    """

    draft: Draft
    tell: Tell = tell_nobody

    def __call__(self, groups: Sequence[Candidates]) -> list[list[float]]:
        model = self.draft.streamed
        windows = some_windows(model, self.draft.options, self.draft.windows)
        most = _WINDOWS * longest(model, self.draft.options.length)
        ends = accumulate(map(len, windows))
        batches = text.batches(window for window, end in zip(windows, ends, strict=True) if end <= most)
        embedding = model.embedding
        first = [group for group in groups if embedding is not None and embedding.name in group.sites]
        rest = [group for group in groups if group not in first]
        measured: list[list[float]] = []
        solver = "gptq" if "hessian" in self.draft.options.chain.solver.needs else "nearest"
        costs = ((EmbeddingCost(), "nearest", first), (find("pipeline.costs", DEFAULT_COST), solver, rest))
        for cost, rounding, some in costs:
            if not some:
                continue
            with tempfile.TemporaryDirectory(prefix="pennyweight-costs-") as directory:
                measured += cached_costs(
                    cost,
                    model,
                    batches,
                    some,
                    inputs=self.draft.inputs,
                    solver=find("solvers", rounding),
                    seed=self.draft.options.seed,
                    scratch=Path(directory) / "work",
                    tell=self.tell,
                )
        return [measured[[*first, *rest].index(group)] for group in groups]


def measuring(draft: Draft, tell: Tell = tell_nobody) -> Measure:
    """How the schemes of `draft` are measured: by what the model makes of them, where it can be run."""
    return Measuring(draft, tell) if draft.is_run else BlindMeasuring(draft, tell)
