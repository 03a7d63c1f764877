"""What a cost is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pennyweight.core.errors import UsageError
from pennyweight.models.base import Site
from pennyweight.models.streamed import StreamedModel
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import Scheme
from pennyweight.solvers.base import Solver

# The cheapest that ranks like `direct`: docs/costs.md.
DEFAULT_COST = "fisher"

Tell = Callable[[int, int], None]


def tell_nobody(done: int, total: int) -> None:
    pass


class Cost(Protocol):
    @property
    def name(self) -> str: ...
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
        """For each group and each of its schemes the predicted increase of the model's loss: finite, never negative, 0
        where the sites stay in float. What a group costs does not depend on the other groups.

        The loss is the mean over tokens of KL(original || changed) in nats; of an encoder the mean over tokens of
        |h - t|² / mean |t|², h its last hidden state and t the original's. `batches` are windows [windows, tokens];
        `solver` makes the error E = W - Ŵ, behind original blocks; `seed` is that of whatever is drawn; `scratch` a
        directory that is made and goes away; `tell(done, total)` follows the work. Raises UsageError for a group with
        a site that the model does not have.
        """


def named_sites(model: StreamedModel, groups: Sequence[Candidates]) -> dict[str, Site]:
    """The sites of all groups by name; raises UsageError for one that is not there."""
    known = {site.name: site for site in model.sites}
    names = dict.fromkeys(name for group in groups for name in group.sites)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: not among the {len(known)} sites of {model.path}")
    return {name: known[name] for name in names}


def asked_schemes(groups: Sequence[Candidates]) -> dict[str, dict[str, Scheme]]:
    """Site -> name -> each scheme that one of its groups may be given."""
    asked: dict[str, dict[str, Scheme]] = {}
    for group in groups:
        for name in group.sites:
            asked.setdefault(name, {}).update({scheme.name: scheme for scheme in group.schemes if scheme is not None})
    return asked


def summed(groups: Sequence[Candidates], of_site: Mapping[tuple[str, str], float]) -> list[list[float]]:
    """The costs of `groups` as sums over their sites; `of_site` has them by names of site and scheme."""
    return [
        [
            0.0 if scheme is None else math.fsum(of_site[name, scheme.name] for name in group.sites)
            for scheme in group.schemes
        ]
        for group in groups
    ]
