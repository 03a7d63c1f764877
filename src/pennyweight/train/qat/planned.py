"""Which sites are trained rounded, and which edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pennyweight.containers.onnx.edges import edges_of
from pennyweight.core.errors import UsageError
from pennyweight.models.network.network import Network
from pennyweight.plan.overrides import Decided, decided_sites, parse_overrides
from pennyweight.plan.plan import Plan
from pennyweight.plan.site_names import nearest_sites
from pennyweight.plan.uniform import uniform_plan
from pennyweight.schemes import Scheme
from pennyweight.schemes.activation import ActivationScheme, NetworkScheme, parse_network_scheme
from pennyweight.schemes.names import parse_scheme
from pennyweight.train.qat.weights import why_not_trained


@dataclass(frozen=True)
class Planned:
    """plan, and for each of its edges that whose scale and zero point it has: its own, or of one it only moves."""

    plan: Plan
    sources: Mapping[str, str]


def planned(
    network: Network,
    wanted: str | NetworkScheme | Plan,
    *,
    keep: Sequence[str] = (),
    at: Sequence[str] = (),
    ends: str | None = None,
) -> Planned:
    """The plan for `network`, its batch norms folded. Raises UsageError for what cannot be trained here."""
    if isinstance(wanted, Plan):
        _check_plan(network, wanted)
        plan = wanted
        kinds = list(plan.edges.values())
    else:
        scheme = parse_network_scheme(wanted) if isinstance(wanted, str) else wanted
        plan = _uniform(network, scheme.weight, _decided(network, keep, at, ends))
        kinds = [] if scheme.activation is None else [scheme.activation]
    for name, each in plan.schemes.items():
        if why := why_not_trained(each):
            raise UsageError(f"{name}: {why}")
    if not kinds:
        return Planned(plan, {})
    return _with_edges(network, plan, kinds[0], is_given=isinstance(wanted, Plan))


def _with_edges(network: Network, plan: Plan, kind: ActivationScheme, *, is_given: bool) -> Planned:
    found = edges_of(network, sites=plan.schemes.keys(), is_dynamic=kind.is_dynamic)
    sources = {edge.value: edge.source for edge in found}
    if not is_given:
        return Planned(replace(plan, edges=dict.fromkeys(sources, kind)), sources)
    known = {name: sources.get(name, name) for name in plan.edges}
    return Planned(plan, {name: source if source in plan.edges else name for name, source in known.items()})


def _uniform(network: Network, scheme: Scheme, decided: Mapping[str, Decided]) -> Plan:
    if why := why_not_trained(scheme):
        raise UsageError(why)
    shapes = {site.name: site.matrix_shape for site in network.sites}

    def why_not(scheme: Scheme, site: str) -> str | None:
        return "it has no weights" if 0 in shapes[site] else None

    plan = uniform_plan({name: shape for name, shape in shapes.items() if name not in decided}, scheme, why_not)
    schemes, kept, changed = dict(plan.schemes), dict(plan.kept), dict(plan.changed)
    for name, one in decided.items():
        if one.scheme is None:
            kept[name] = one.reason
        else:
            schemes[name] = one.scheme.with_scale_dtype(torch.float32)
            changed[name] = f"{schemes[name]} in place of {scheme}: {one.reason}"
    in_order = {name: schemes[name] for name in shapes if name in schemes}
    return replace(plan, schemes=in_order, kept=kept, changed=changed)


def _decided(network: Network, keep: Sequence[str], at: Sequence[str], ends: str | None) -> dict[str, Decided]:
    names = [site.name for site in network.sites]
    if not names:
        raise UsageError("the network has no convolution, linear map, embedding, LSTM or GRU: nothing to quantize")
    decided = (
        {} if ends is None else {name: Decided(parse_scheme(ends), f"ends={ends}") for name in (names[0], names[-1])}
    )
    return decided | dict(decided_sites(names, (), parse_overrides(keep, at)))


def _check_plan(network: Network, plan: Plan) -> None:
    sites, values = [site.name for site in network.sites], [node.name for node in network.graph.graph.nodes]
    for name in plan.schemes:
        if name not in sites:
            raise UsageError(f"the plan's site {name!r} is not in the network; {nearest_sites(name, sites)}")
    for name in plan.edges:
        if name not in values:
            raise UsageError(f"the plan's edge {name!r} is not in the network; {nearest_sites(name, values)}")
