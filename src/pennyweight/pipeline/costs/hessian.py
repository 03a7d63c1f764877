"""The share of a site's output that is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.costs.base import Cost, Tell, asked_schemes, named_sites, summed, tell_nobody
from pennyweight.pipeline.costs.rounded import original_weights, solved, statistics
from pennyweight.plan.candidates import Candidates
from pennyweight.solvers.base import Solver


@dataclass(frozen=True)
class HessianCost:
    """c = r/n tr(E H Eᵀ) / tr(W H Wᵀ),    E = W - Ŵ,

    H the mean of x xᵀ over the r of n tokens that the site sees (at least one), summed over a group's sites: the energy
    that its output loses, over the energy that it has. No unit: sites are compared by the size of their outputs, not by
    what the model makes of them. One pass forwards. Over about 64 rows of a matrix, as in the record of a run.
    """

    name: str = "hessian"

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
        asked, named = asked_schemes(groups), named_sites(model, groups)
        costs: dict[tuple[str, str], float] = {}
        stream = model.start(batches)
        tokens = sum(ids.numel() for ids in batches)
        last = 1 + max((site.block for site in named.values()), default=-1)
        for index in range(last):
            sites = {name: site for name, site in named.items() if site.block == index}
            with model.opened(index) as block:
                weights = original_weights(model, sites)
                found = statistics(model, block, index, stream, hands_on=True)
            for name, site in sites.items():
                share = max(1, found[name].rows) / tokens
                for scheme in asked[name].values():
                    record = solved(site, weights[name], scheme, solver, found[name]).record
                    costs[name, scheme.name] = share * record.error
            tell(index + 1, last)
        return summed(groups, costs)


PROVIDES: tuple[Cost, ...] = (HessianCost(),)
