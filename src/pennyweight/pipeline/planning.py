"""A plan under a budget: what can be chosen, what each choice costs, and the choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pennyweight.containers.base import Container
from pennyweight.core.errors import BudgetError, ContainerError, UsageError
from pennyweight.models.base import Site
from pennyweight.pipeline.beside import output_bytes
from pennyweight.pipeline.job import Draft
from pennyweight.pipeline.sizes import weight_count
from pennyweight.plan.allocate import Allocation, allocate
from pennyweight.plan.budget import Budget
from pennyweight.plan.candidates import Candidates, candidates
from pennyweight.plan.choices import Choice, Group, smallest
from pennyweight.plan.frontier import Frontier, frontier
from pennyweight.plan.overrides import Decided, decided_sites, parse_overrides
from pennyweight.plan.plan import Plan
from pennyweight.plan.plan_file import PlanEntries, PlanName
from pennyweight.plan.site_names import sites_called
from pennyweight.plan.uniform import uniform_plan
from pennyweight.schemes import PerGroup, Scheme, parse_scheme

# (groups) -> for each of them the cost of each of its schemes
Measure = Callable[[Sequence[Candidates]], list[list[float]]]

# Of a frontier: about a hundredth in size between them.
_POINTS = 200
# Of a head or an embedding in fewer bits everything suffers.
_LEAST_BITS_OF_ENDS = 4
ENDS = ("head", "embedding")
# Plans have records of other lengths: rounds in which the room for tensors is what the longest so far leaves.
_ROUNDS = 24


@dataclass(frozen=True)
class Problem:
    """What a plan is chosen from.

    groups       sites that share a scheme, and what each of their choices takes and costs
    fixed_bytes  of all tensors that are no sites'
    weights      of the whole model
    decided      what the user decided, by site
    """

    groups: list[Group]
    fixed_bytes: int
    weights: int
    decided: Mapping[str, Decided]

    def allocated(self, tensor_bytes: int) -> Allocation:
        """The best choices with which all tensors together take at most `tensor_bytes`; raises BudgetError."""
        try:
            return allocate(self.groups, tensor_bytes - self.fixed_bytes)
        except BudgetError as error:
            raise BudgetError(tensor_bytes, error.smallest + self.fixed_bytes, self.advice) from error

    def of(self, plan: Plan) -> tuple[int, float]:
        """Bytes of all tensors, and the predicted loss, of a `plan` of these choices."""
        chosen = [
            next(choice for choice in group.choices if choice.scheme == plan.schemes.get(group.sites[0]))
            for group in self.groups
        ]
        return (
            self.fixed_bytes + sum(choice.size_bytes for choice in chosen),
            math.fsum(choice.cost for choice in chosen),
        )

    @cached_property
    def frontier(self) -> Frontier:
        """The best plans over all sizes, in bytes of all tensors."""
        found = frontier(self.groups, points=_POINTS, weights=self.weights)
        moved = (replace(point, size_bytes=point.size_bytes + self.fixed_bytes) for point in found.points)
        return replace(found, points=tuple(moved))

    @property
    def uniform(self) -> list[tuple[str, int, float]]:
        """Name, bytes and predicted loss of the plans that give every site the same number format in groups of one
        size, or in smaller ones where that does not divide its inputs."""
        found = []
        for wanted in dict.fromkeys(choice.scheme for group in self.groups for choice in group.choices):
            chosen = [None if wanted is None else _fitted(group, wanted) for group in self.groups]
            schemes = [scheme for scheme in chosen if scheme is not None]
            if wanted is not None and len(schemes) == len(self.groups):
                by_site = zip(self.groups, schemes, strict=True)
                plan = Plan({site: scheme for group, scheme in by_site for site in group.sites})
                found.append((wanted.name, *self.of(plan)))
        return found

    @property
    def advice(self) -> str:
        """What would make smaller plans possible."""
        total = self.fixed_bytes + smallest(self.groups)
        share = (
            f"{100 * self.fixed_bytes / total:.0f} % of it are embeddings and others that this target keeps in float"
        )
        held = [site for site in self.decided if self.decided[site].scheme is None]
        return f"{share}; {len(held)} sites are kept in float by --keep or --at" if held else share

    def plan(self, schemes: Mapping[str, Scheme | None]) -> Plan:
        chosen = {site: scheme for site, scheme in schemes.items() if scheme is not None}
        return Plan(chosen, {site: self._why_kept(site) for site, scheme in schemes.items() if scheme is None})

    def _why_kept(self, site: str) -> str:
        return self.decided[site].reason if site in self.decided else "there is room for it, or the target takes none"


def _fitted(group: Group, wanted: Scheme) -> Scheme | None:
    """The choice of `group` that is `wanted`, or that in its number format with the next smaller groups."""
    schemes = [choice.scheme for choice in group.choices if choice.scheme is not None]
    if not isinstance(wanted.granularity, PerGroup):
        return wanted if wanted in schemes else None
    sizes = {
        scheme.granularity.size: scheme
        for scheme in schemes
        if isinstance(scheme.granularity, PerGroup)
        and scheme.granularity.size <= wanted.granularity.size
        and scheme.element == wanted.element
    }
    return sizes[max(sizes)] if sizes else None


def problem_of(draft: Draft, measure: Measure) -> Problem:
    """Everything that can be chosen for the model of `draft`, with its costs."""
    model, container = draft.model, draft.container
    fused = [*container.fused(draft.listed, runtime=draft.options.runtime), *_same_tensor(draft.listed)]
    decided = decided_of(draft, fused)

    def why_not(scheme: Scheme, name: str) -> str | None:
        if draft.sites[name].kind in ENDS and scheme.element.bits < _LEAST_BITS_OF_ENDS:
            return "too few bits for a head or an embedding"
        return draft.why_not(scheme, name)

    found = candidates(
        {name: site.shape for name, site in draft.sites.items()},
        fused=fused,
        decided=decided,
        finish=draft.finished,
        why_not=why_not,
        alphabet=container.alphabet,
        stand_ins=container.stand_ins,
    )
    found = [_without_refused(draft, one, found) for one in found]
    costs = measure(found)
    groups = [
        Group(
            one.sites,
            tuple(
                Choice(scheme, _bytes(draft, [draft.sites[name] for name in one.sites], scheme), cost)
                for scheme, cost in zip(one.schemes, of_group, strict=True)
            ),
        )
        for one, of_group in zip(found, costs, strict=True)
    ]
    owned = {site.tensor for site in draft.listed}
    fixed = sum(_kept_bytes(draft, name) for name in model.checkpoint.tensors if name not in owned)
    fixed += sum(tensor.nbytes for tensor in container.added.values())
    return Problem(groups, fixed, weight_count(model), decided)


def decided_of(draft: Draft, fused: Sequence[Sequence[str]]) -> dict[str, Decided]:
    """What --keep and --at decide, with what is `fused` with that; raises ContainerError where the target refuses."""
    overrides = parse_overrides(draft.options.keep, draft.options.at)
    for override in overrides:
        is_known = bool(sites_called(override.glob, draft.sites))
        if not is_known and draft.model.why_no_head and "head" in override.glob:
            raise UsageError(f"{override.said}: {draft.model.why_no_head}")
    decided = decided_sites(list(draft.sites), fused, overrides)
    return {site: _taken(draft, site, one) for site, one in decided.items()}


def _taken(draft: Draft, site: str, decided: Decided) -> Decided:
    if decided.scheme is None:
        return decided
    scheme = draft.finished(decided.scheme)
    inputs = draft.sites[site].shape[1]
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else 1
    refusal = f"groups of {size} do not divide its {inputs} inputs" if inputs % size else draft.why_not(scheme, site)
    if refusal is not None:
        raise ContainerError(f"{decided.reason}: {site} cannot be {scheme}: {refusal}")
    return replace(decided, scheme=scheme)


def uniform(draft: Draft) -> Plan:
    """The scheme of the options for every site of the blocks, and for embedding and head what the container gives them
    then, but for those that the user decided otherwise."""
    container, decided = draft.container, decided_of(draft, ())
    scheme = draft.finished(parse_scheme(draft.options.scheme or container.default_scheme))
    open_ones = {name: site for name, site in draft.sites.items() if name not in decided}

    def planned(wanted: Scheme, *, is_end: bool) -> Plan:
        shapes = {name: site.shape for name, site in open_ones.items() if (site.kind in ENDS) == is_end}
        return uniform_plan(shapes, wanted, draft.why_not, container.stand_ins)

    plans = [_plan_of(decided), planned(scheme, is_end=False)]
    of_ends = container.scheme_of_ends(scheme)
    if of_ends is not None:
        plans.append(planned(of_ends, is_end=True))
    schemes = {name: found for plan in plans for name, found in plan.schemes.items()}
    return Plan(
        {name: schemes[name] for name in draft.sites if name in schemes},
        {name: why for plan in plans for name, why in plan.kept.items()},
        {name: why for plan in plans for name, why in plan.changed.items()},
    )


def check_name(plan: PlanEntries | PlanName | None, container: Container, *, runtime: str) -> None:
    """Raises UsageError where `plan` is a name that the container of `runtime` does not know."""
    if isinstance(plan, PlanName) and plan.source not in container.presets:
        known = ", ".join(container.presets)
        names = f"it is no plan that {runtime} knows: {known}" if known else f"{runtime} knows no plan by name"
        raise UsageError(f"--plan {plan.source}: there is no such file, and {names}")


def preset(draft: Draft, name: str) -> Plan:
    """The plan that the container knows by `name`, but for the sites that the user decided otherwise."""
    found = draft.container.preset(name, draft.listed, has_data=draft.windows is not None)

    def taken(site: str) -> Decided:
        scheme = found[site]
        refusal = None if scheme is None else draft.why_not(scheme, site)
        return Decided(scheme, f"as in {name}") if refusal is None else Decided(None, refusal)

    return _plan_of({site: taken(site) for site in draft.sites} | decided_of(draft, ()))


def given(draft: Draft, entries: PlanEntries) -> Plan:
    """The plan that the user gives; raises ContainerError where the target refuses a scheme of it."""
    named = entries.schemes(list(draft.sites))
    return _plan_of({site: _taken(draft, site, Decided(scheme, entries.source)) for site, scheme in named.items()})


def _plan_of(decided: Mapping[str, Decided]) -> Plan:
    schemes = {site: one.scheme for site, one in decided.items() if one.scheme is not None}
    return Plan(schemes, {site: one.reason for site, one in decided.items() if one.scheme is None})


def _same_tensor(sites: Sequence[Site]) -> list[tuple[str, ...]]:
    """Sites that one tensor of the checkpoint holds: all of them are replaced, or none."""
    together: dict[str, list[str]] = {}
    for site in sites:
        together.setdefault(site.tensor, []).append(site.name)
    return [tuple(names) for names in together.values() if len(names) > 1]


def _without_refused(draft: Draft, one: Candidates, every: Sequence[Candidates]) -> Candidates:
    """`one` without staying in float where the target, which merges its sites, then refuses the rest."""
    if len(one.sites) == 1 or len(one.schemes) == 1:
        return one
    others = {site: other.schemes[0] for other in every if other is not one for site in other.sites}
    trial = Plan(
        {site: scheme for site, scheme in others.items() if scheme is not None},
        {site: "" for site, scheme in others.items() if scheme is None} | dict.fromkeys(one.sites, ""),
    )
    if not trial.schemes or draft.refusal(trial) is None:
        return one
    return replace(one, schemes=tuple(scheme for scheme in one.schemes if scheme is not None))


def _bytes(draft: Draft, sites: Sequence[Site], scheme: Scheme | None) -> int:
    if scheme is None:
        return sum(_kept_bytes(draft, name) for name in {site.tensor for site in sites})
    return sum(info.size_bytes for site in sites for info in draft.container.entries(site, scheme).values())


def _kept_bytes(draft: Draft, name: str) -> int:
    """Of a tensor of the checkpoint that stays in float, as it will be stored."""
    kept = draft.container.kept(name, draft.model.checkpoint.tensors[name])
    return 0 if kept is None else kept.info.size_bytes


def within(draft: Draft, problem: Problem, budget: Budget) -> Plan:
    """The best plan under a `budget` of size or bits; raises BudgetError, and UsageError for a budget of loss."""
    if budget.is_of_loss:
        raise UsageError(f"{budget}: a loss is kept by trial, which pennyweight.quantize does; a run takes the plan")
    if budget.kind == "bpw":
        allocation = problem.allocated(int(budget.value * problem.weights / 8))
        return problem.plan(allocation.schemes(problem.groups))
    asked, least = int(budget.value), problem.fixed_bytes + smallest(problem.groups)
    room = asked
    for _ in range(_ROUNDS):
        plan = problem.plan(problem.allocated(max(room, least)).schemes(problem.groups))
        written = output_bytes(draft.job(plan))
        if written <= asked:
            return plan
        if room <= least:
            # The record names the size that was asked: more digits take more room.
            raise BudgetError(asked, written + len(str(written)) - len(str(asked)), problem.advice)
        room = asked - (written - problem.of(plan)[0])
    raise ContainerError(f"{budget}: what lies beside the tensors grows faster than they shrink: give a larger size")
