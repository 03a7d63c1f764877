"""In which schemes of a container the weights of an artefact keep their codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pennyweight.models.base import Site
from pennyweight.models.decoders.base import Coded
from pennyweight.pipeline.job import Draft
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight, Scheme, reexpressed


@dataclass
class Match:
    """What a container can hold of an artefact where the model has the type `dtype`.

    schemes  site -> the scheme in which its codes go along
    wider    sites whose new reader multiplies in a wider type: rounded to the old one's, the weights are the same
    lost     quantized weight -> why its codes cannot go along; it can only stay in float
    rounded  tensors in float that a runtime of that type would round
    """

    dtype: str
    schemes: dict[str, Scheme] = field(default_factory=dict)
    wider: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return len(self.lost) + len(self.rounded)


def best_match(draft: Draft, coded: Mapping[str, Coded | None]) -> Match:
    """The match in the first of the container's types that loses nothing, else in the one that loses least."""
    types = draft.container.load_types(draft.facts, runtime=draft.options.runtime)
    found: list[Match] = []
    for dtype in types or (draft.facts.dtype,):
        facts = replace(draft.facts, dtype=dtype)
        found.append(_match(replace(draft, facts=facts), coded, load=getattr(torch, dtype) if types else None))
        if not found[-1].faults:
            break
    return min(found, key=lambda match: match.faults)


def _match(draft: Draft, coded: Mapping[str, Coded | None], *, load: torch.dtype | None) -> Match:
    """`load`: the type to which a runtime rounds whatever it loads, None where it does not."""
    match = Match(draft.facts.dtype)
    sites = every_site(draft)
    known = {site.tensor for site in sites}
    match.lost |= dict.fromkeys(coded.keys() - known, "it is no linear map or table of tokens that is written in codes")
    fused = draft.container.fused(sites, runtime=draft.options.runtime)
    together = {name for names in fused for name in names}
    by_name = {site.name: site for site in sites}
    for names in [*fused, *((name,) for name in by_name if name not in together)]:
        _match_group(match, draft, [by_name[name] for name in names], coded, load=load)
    replaced = {by_name[name].tensor for name in match.schemes}
    if load is not None:
        match.rounded += [name for name in _floats(draft, replaced) if _is_rounded(draft, name, load)]
    return match


def every_site(draft: Draft) -> list[Site]:
    """The sites of the draft, and an embedding that the container does not take."""
    embedding = draft.model.embedding
    first = [embedding] if embedding is not None and embedding.name not in draft.sites else []
    return [*first, *draft.listed]


def _match_group(
    match: Match, draft: Draft, sites: Sequence[Site], coded: Mapping[str, Coded | None], *, load: torch.dtype | None
) -> None:
    """The first scheme that holds all of `sites`, which share one."""
    stored = {site.name: coded[site.tensor] for site in sites if site.tensor in coded}
    if not stored:
        return
    floats = [site.name for site in sites if site.name not in stored]
    odd = [name for name, one in stored.items() if one is None]
    known = {name: one for name, one in stored.items() if one is not None}
    if floats or odd:
        reason = (
            f"{floats[0]}, which must be stored alike, is in float"
            if floats
            else f"{odd[0]}: it is stored in no scheme"
        )
        match.lost |= dict.fromkeys(stored, reason)
        return
    container = draft.container
    offered = [
        scheme for one in dict.fromkeys(c.scheme for c in known.values()) for scheme in container.equivalents(one)
    ]
    possible = list(dict.fromkeys(draft.finished(scheme) for scheme in offered))
    wider: set[tuple[str, Scheme]] = set()
    for number, site in enumerate(sites):
        weight, old = known[site.name].read(), draft.model.checkpoint.read(site.tensor)
        held, reason = [], f"{draft.container.name} has no scheme for {weight.scheme}"
        for scheme in possible:
            found = _fit(draft, site, weight, old, scheme, load=load)
            if not isinstance(found, str):
                held.append(scheme)
                wider |= {(site.name, scheme)} if found else set()
                if number == len(sites) - 1:
                    break
            elif scheme.element.bits >= weight.scheme.element.bits:
                reason = found
        possible = held
        if not possible:
            reason = reason.removeprefix(f"{site.name}: ")
            match.lost |= {name: reason if name == site.name else f"{site.name}: {reason}" for name in stored}
            return
    match.schemes |= dict.fromkeys(stored, possible[0])
    match.wider += [name for name in stored if (name, possible[0]) in wider]


def _fit(
    draft: Draft, site: Site, weight: QuantizedWeight, old: Tensor, scheme: Scheme, *, load: torch.dtype | None
) -> bool | str:
    """Whether the reader of `scheme` is wider than that of `weight`, whose weights are `old`; or why `scheme` does not
    hold them."""
    refusal = (
        draft.why_not(scheme, site.name)
        if site.name in draft.sites
        else draft.container.why_not(scheme, site, runtime=draft.options.runtime)
    )
    if refusal is not None:
        return refusal
    again = reexpressed(weight, scheme)
    if isinstance(again, str):
        return again
    new = again.dequantize() if load is None else again.dequantize(load).float()
    if torch.equal(new, old.float()):
        return False
    if torch.equal(new.to(weight.scheme.arithmetic).to(old.dtype).float(), old.float()):
        return True
    kind = str(scheme.arithmetic if load is None else load).removeprefix("torch.")
    return f"as {scheme} it would be computed in {kind}, which would round its weights"


def _floats(draft: Draft, replaced: set[str]) -> list[str]:
    tensors = draft.model.checkpoint.tensors
    return [name for name, info in tensors.items() if name not in replaced and info.dtype.is_floating_point]


def _is_rounded(draft: Draft, name: str, load: torch.dtype) -> bool:
    dtype = draft.model.checkpoint.tensors[name].dtype
    if torch.promote_types(dtype, load) == load:
        return False
    tensor = draft.model.checkpoint.read(name)
    return not torch.equal(tensor.to(load).to(dtype), tensor)


def plan_of(draft: Draft, match: Match, coded: Mapping[str, Coded | None]) -> Plan:
    """`match` as a plan, in the order of the sites."""
    kept, changed = {}, {}
    for site in every_site(draft):
        if site.name in match.schemes:
            changed[site.name] = _changed(site, match, coded)
        elif site.tensor in coded:
            kept[site.name] = match.lost[site.name]
        elif site.kind not in ("head", "embedding"):
            kept[site.name] = "it is in float in the artefact that was converted"
    schemes = {name: match.schemes[name] for name in draft.sites if name in match.schemes}
    return Plan(schemes, {**kept, **draft.model.refused}, {name: text for name, text in changed.items() if text})


def _changed(site: Site, match: Match, coded: Mapping[str, Coded | None]) -> str:
    stored, scheme = coded[site.tensor], match.schemes[site.name]
    assert stored is not None
    said = "" if scheme == stored.scheme else f"{scheme} with the codes of {stored.scheme}"
    if site.name not in match.wider:
        return said
    old, new = (str(one.arithmetic).removeprefix("torch.") for one in (stored.scheme, scheme))
    return f"{said}, computed in {new} and no longer rounded to {old}"
