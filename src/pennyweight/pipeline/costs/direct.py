"""The model's own loss with one group changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.models.base import Site
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.costs.base import Cost, Tell, tell_nobody
from pennyweight.pipeline.costs.changed import Original, each_group
from pennyweight.pipeline.costs.rounded import rounded
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import Scheme
from pennyweight.solvers.base import Solver


@dataclass(frozen=True)
class DirectCost:
    """c = loss of the model in which the group has the scheme and all else is as it was.

    For each scheme of each group the blocks from the group's first on are run again, and the head.
    """

    name: str = "direct"

    @one_thread_per_operation()
    def measure(
        self,
        model: StreamedModel,
        batches: Sequence[Tensor],
        groups: Sequence[Candidates],
        *,
        solver: Solver,
        seed: int,
        scratch: Path,
        tell: Tell = tell_nobody,
    ) -> list[list[float]]:
        """See Cost."""
        return each_group(model, batches, groups, scratch, partial(_of_group, solver=solver), tell)


def _of_group(
    reference: Original, sites: Sequence[Site], schemes: Sequence[Scheme | None], *, solver: Solver
) -> list[float]:
    variants = [scheme for scheme in schemes if scheme is not None]
    if not variants:
        return [0.0 for _ in schemes]

    def changed(site: Site, w: Tensor, found: SiteStatistics, variant: int) -> Tensor:
        return rounded(site, w, variants[variant], solver, found)

    losses = iter(reference.losses(sites, len(variants), changed))
    return [0.0 if scheme is None else next(losses) for scheme in schemes]


PROVIDES: tuple[Cost, ...] = (DirectCost(),)
