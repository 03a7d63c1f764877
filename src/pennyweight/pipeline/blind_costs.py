"""What schemes cost in a model that cannot be run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import parallel_map
from pennyweight.models.base import Site
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.costs.base import Tell, asked_schemes, summed, tell_nobody
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.rows import stored_matrix
from pennyweight.pipeline.solve import check_finite, solve_site
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import Scheme
from pennyweight.solvers.base import Statistics

# Rows of a matrix that are rounded, evenly spaced.
_ROWS = 64


@dataclass(frozen=True)
class BlindMeasuring:
    """c = tr(E D Eᵀ) / tr(W D Wᵀ),    E = W - Ŵ rounded to nearest,

    D the diagonal of importances, or the identity, over about 64 rows of each matrix, summed over a group's sites: the
    share of its output that a site loses. What the model makes of that is not seen.
    """

    draft: Draft
    tell: Tell = tell_nobody

    def __call__(self, groups: Sequence[Candidates]) -> list[list[float]]:
        asked = list(asked_schemes(groups).items())
        costs: dict[tuple[str, str], float] = {}
        for done, (name, schemes) in enumerate(asked, 1):
            for scheme, cost in zip(schemes, self._of_site(self.draft.sites[name], schemes.values()), strict=True):
                costs[name, scheme] = cost
            self.tell(done, len(asked))
        return summed(groups, costs)

    def _of_site(self, site: Site, schemes: Collection[Scheme]) -> list[float]:
        rows, known = self._rows(site), self.draft.known.get(site.name, SiteStatistics(Statistics(), 0))

        def cost(scheme: Scheme) -> float:
            return solve_site(site, rows, scheme, self.draft.blind, known).record.error

        return parallel_map(cost, list(schemes))

    def _rows(self, site: Site) -> Tensor:
        """Some rows of the matrix, float32."""
        model = self.draft.model
        step = max(1, site.shape[0] // _ROWS)
        parts = [stored_matrix(model.checkpoint, site, slice(n, n + 1)) for n in range(0, site.shape[0], step)]
        rows = torch.cat(parts).to(model.device, torch.float32)
        check_finite(rows, site.tensor)
        return rows
