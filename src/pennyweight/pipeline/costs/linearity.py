"""A constant for each group, measured with noise, times the size of the error."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
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
class LinearityCost:
    """c = a t²,    t² = |W - Ŵ|² / |W|²,    a = loss(W + N) / `size`²,

    with N Gaussian noise of norm `size` |W| in every site of the group: the loss is linear in t² (Malinovskii,
    Panferov, Ilin, Guo, Richtárik, Alistarh, "Pushing the limits of large language model quantization via the linearity
    theorem", arXiv:2411.17525, theorem 1). t² of a group is the mean over its sites, weighted by their weights. For
    each group the blocks from its first on are run again once. It sees how much the model depends on a site, and not
    that an error may lie where the site's inputs are small.
    """

    size: float = 0.1
    name: str = "linearity"

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
        return each_group(model, batches, groups, scratch, partial(self._of_group, solver=solver, seed=seed), tell)

    def _of_group(
        self,
        reference: Original,
        sites: Sequence[Site],
        schemes: Sequence[Scheme | None],
        *,
        solver: Solver,
        seed: int,
    ) -> list[float]:
        if all(scheme is None for scheme in schemes):
            return [0.0 for _ in schemes]
        errors = _Errors(schemes, solver)

        def changed(site: Site, w: Tensor, found: SiteStatistics, variant: int) -> Tensor:
            errors.add(site, w, found)
            noise = torch.empty(w.shape).normal_(generator=_generator(site, seed)).to(w.device)
            return w.add(noise, alpha=self.size * float(w.norm() / noise.norm()))

        [loss] = reference.losses(sites, 1, changed)
        return [loss / self.size**2 * error for error in errors.means()]


@dataclass
class _Errors:
    """t² of each scheme, summed over the weights of the sites added, and their number."""

    schemes: Sequence[Scheme | None]
    solver: Solver
    sums: list[float] = field(default_factory=list)
    weights: int = 0

    def __post_init__(self) -> None:
        self.sums = [0.0 for _ in self.schemes]

    def add(self, site: Site, w: Tensor, found: SiteStatistics) -> None:
        energy = float(w.double().square().sum())
        self.weights += w.numel()
        for n, scheme in enumerate(self.schemes):
            if scheme is not None and energy:
                e = w - rounded(site, w, scheme, self.solver, found)
                self.sums[n] += w.numel() * float(e.double().square().sum()) / energy

    def means(self) -> list[float]:
        return [total / max(1, self.weights) for total in self.sums]


def _generator(site: Site, seed: int) -> torch.Generator:
    """The same for a site whatever else is measured."""
    digest = hashlib.sha256(f"{seed} {site.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


PROVIDES: tuple[Cost, ...] = (LinearityCost(),)
