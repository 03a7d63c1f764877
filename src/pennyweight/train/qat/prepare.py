"""A network in memory -> the same, trainable, with its weights and edges rounded as they will be deployed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import fx, nn

from pennyweight.core.errors import DataError, UsageError, WeightError
from pennyweight.models.network import Network, QuantizedNetwork, capture, fold_batch_norms
from pennyweight.plan.plan import Plan
from pennyweight.schemes.activation import NetworkScheme
from pennyweight.train.qat.activations import ActivationRounding, DynamicRounding
from pennyweight.train.qat.batches import example_of
from pennyweight.train.qat.codes import start_from_codes_
from pennyweight.train.qat.folded import norms_of, start_sizes
from pennyweight.train.qat.options import QatOptions
from pennyweight.train.qat.planned import Planned, planned
from pennyweight.train.qat.ranges import edge_starts, weight_start
from pennyweight.train.qat.rewrite import rewritten
from pennyweight.train.qat.weights import WeightRounding

Trainable = nn.Module | Network | QuantizedNetwork


def prepare(
    net: Trainable,
    scheme: str | NetworkScheme | Plan | None = None,
    *,
    example: Any = None,
    calibration: Iterable[Any] | None = None,
    keep: Sequence[str] = (),
    at: Sequence[str] = (),
    options: QatOptions = QatOptions(),
) -> fx.GraphModule:
    """`net` as a module to train in any loop, whose forward pass rounds what `scheme` says; `finish` gives its codes.

    net          a module, which is captured and not changed; a Network; or a QuantizedNetwork, to go on from its codes
    scheme       "int4-channel" for weights alone, "w4a8-channel" with activations, or a Plan; that of a
                 QuantizedNetwork may be left out
    example      a batch to capture a module with; without it the first of `calibration`
    calibration  batches (labels behind the inputs are left out) from which the ranges of edges start; without it the
                 example
    keep, at     globs of sites that stay in float, and GLOB=SCHEME for sites that get another one

    Raises UsageError, ModelError where the module cannot be captured, DataError and WeightError.
    """
    batches = None if calibration is None else iter(calibration)
    if isinstance(net, nn.Module) and example is None:
        example, batches = _first(net, batches)
    network = _network(net, example)
    folded = fold_batch_norms(network)
    start = net if isinstance(net, QuantizedNetwork) else None
    wanted = planned(folded, _scheme(scheme, start), keep=keep, at=at, ends=options.ends)
    weights = _weights(network, wanted.plan, start, options)
    edges = _edges(folded, wanted, start, batches)
    model = rewritten(network, wanted, weights, edges)
    if start is not None:
        start_from_codes_(model, start)
    return model


def _first(net: nn.Module, batches: Iterator[Any] | None) -> tuple[Any, Iterator[Any]]:
    """The example that the first batch is, and all batches."""
    if batches is None:
        raise UsageError(f"{type(net).__name__} is captured with an example: give example= a batch, or calibration=")
    try:
        first = next(batches)
    except StopIteration:
        raise DataError("calibration yields no batches: give at least one") from None
    return example_of(net, first), itertools.chain([first], batches)


def _network(net: Trainable, example: Any) -> Network:
    if isinstance(net, nn.Module):
        return capture(net, example)
    return net.network if isinstance(net, QuantizedNetwork) else net


def _scheme(scheme: str | NetworkScheme | Plan | None, start: QuantizedNetwork | None) -> str | NetworkScheme | Plan:
    if scheme is not None:
        return scheme
    if start is None:
        raise UsageError("no scheme was given: for example int4-channel for weights, w8a8-channel with activations")
    return start.plan


def _weights(
    network: Network, plan: Plan, start: QuantizedNetwork | None, options: QatOptions
) -> dict[str, WeightRounding]:
    """How each site of the plan is rounded, from the scales of `start` or from those that fit its weight."""
    norms = norms_of(network)
    found = {}
    for site in network.sites:
        scheme = plan.schemes.get(site.name)
        if scheme is None:
            continue
        matrix = site.matrix(network.weight(site).detach())
        if not bool(matrix.isfinite().all()):
            raise WeightError(f"{site.parameter} has NaN or infinity: train from weights that are finite")
        if site.name in norms:
            _, norm = norms[site.name]
            matrix = matrix * start_sizes(norm, scheme)[:, None]
        given = None if start is None else start.weights.get(site.name)
        is_same = given is not None and given.scheme == scheme
        parameters = given.parameters if given is not None and is_same else weight_start(matrix, scheme, options.start)
        found[site.name] = WeightRounding(site, scheme, parameters, has_history=options.history)
    return found


def _edges(
    folded: Network, wanted: Planned, start: QuantizedNetwork | None, batches: Iterable[Any] | None
) -> dict[str, nn.Module]:
    """How each edge that is no other's is rounded."""
    kinds = {source: wanted.plan.edges[source] for source in dict.fromkeys(wanted.sources.values())}
    static = {name: kind for name, kind in kinds.items() if not kind.is_dynamic}
    found: dict[str, nn.Module] = {name: DynamicRounding(kind) for name, kind in kinds.items() if kind.is_dynamic}
    if not static:
        return found
    starts = edge_starts(folded, static, [folded.example] if batches is None else batches)
    for name, kind in static.items():
        known = None if start is None else start.activations.get(name)
        parameters = known if known is not None and known.element == kind.element else starts[name].parameters
        # Behind a ReLU a zero point would only waste codes.
        learns_zero = starts[name].has_negative and not kind.is_symmetric
        found[name] = ActivationRounding(kind, parameters, features=starts[name].features, learns_zero=learns_zero)
    return found
