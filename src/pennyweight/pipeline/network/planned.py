"""The scheme of each site of a network and of each edge, before any is rounded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from pennyweight.containers.onnx import edges_of, why_not
from pennyweight.core.errors import ContainerError, UsageError
from pennyweight.models.network.network import Network, NetworkSite
from pennyweight.pipeline.network.options import NetworkOptions
from pennyweight.plan.overrides import Decided, decided_sites, parse_overrides
from pennyweight.plan.plan import Plan
from pennyweight.plan.uniform import uniform_plan
from pennyweight.schemes import Scheme


def uniform_network_plan(network: Network, options: NetworkOptions) -> Plan:
    """The scheme of the options for every site, but for what was decided otherwise, and the edges that follow.

    Where the container refuses the scheme, or its groups do not divide the inputs, a finer one that it takes stands in.
    """
    decided = decided_by(network, options)
    shapes = {site.name: site.matrix_shape for site in network.sites if site.name not in decided}
    wanted = options.network_scheme
    found = uniform_plan(shapes, wanted.weight, Refusals(network, options))
    schemes = dict(found.schemes) | {name: one.scheme for name, one in decided.items() if one.scheme is not None}
    kept = dict(found.kept) | {name: one.reason for name, one in decided.items() if one.scheme is None}
    in_order = {site.name: schemes[site.name] for site in network.sites if site.name in schemes}
    return with_edges(network, replace(found, schemes=in_order, kept=kept), options)


def with_edges(network: Network, plan: Plan, options: NetworkOptions) -> Plan:
    """`plan` with the edges that the runtime rounds where its sites are quantized; none for weights alone."""
    activation = options.network_scheme.activation
    if activation is None:
        return plan
    edges = edges_of(network, sites=plan.schemes, is_dynamic=activation.is_dynamic)
    return replace(plan, edges={edge.value: activation for edge in edges})


def decided_by(network: Network, options: NetworkOptions) -> dict[str, Decided]:
    """What the user decided: by name or glob, and for both ends of the network.

    Raises UsageError for a glob that matches nothing, ContainerError where the target refuses a scheme.
    """
    names = [site.name for site in network.sites]
    if not names:
        raise UsageError("the network has no convolution, linear map, embedding, LSTM or GRU: nothing can be quantized")
    found: dict[str, Decided] = {}
    if options.scheme_of_ends is not None:
        found |= dict.fromkeys((names[0], names[-1]), Decided(options.scheme_of_ends, f"ends={options.ends}"))
    found |= decided_sites(names, (), parse_overrides(options.keep, options.at))
    refusals = Refusals(network, options)
    return {name: _taken(network.site(name), one, refusals) for name, one in found.items()}


def _taken(site: NetworkSite, decided: Decided, refusals: Refusals) -> Decided:
    if decided.scheme is None:
        return decided
    scheme = decided.scheme.with_scale_dtype(torch.float32)
    refusal = refusals(scheme, site.name)
    if refusal is not None:
        raise ContainerError(f"{decided.reason}: {site.name} cannot be {scheme}: {refusal}")
    return replace(decided, scheme=scheme)


class Refusals:
    """Why the runtime does not take a scheme for a site, or None: what a plan asks."""

    def __init__(self, network: Network, options: NetworkOptions) -> None:
        self._sites: Mapping[str, NetworkSite] = {site.name: site for site in network.sites}
        self._runtime, self._activation = options.runtime, options.network_scheme.activation

    def __call__(self, scheme: Scheme, site: str) -> str | None:
        return why_not(scheme, self._sites[site], self._runtime, activation=self._activation)
