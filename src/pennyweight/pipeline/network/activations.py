"""The ranges of static activations: histograms of all edges in one pass, and what is chosen from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pennyweight.containers.onnx import Edge
from pennyweight.core.registry import find
from pennyweight.models.network.network import Inputs, Network
from pennyweight.pipeline.network.consumers import Consumers, consumers_of
from pennyweight.pipeline.network.options import OUTPUT
from pennyweight.pipeline.network.samples import some_samples
from pennyweight.pipeline.network.shelf import Shelf
from pennyweight.pipeline.network.walk import Walk
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme
from pennyweight.stats.histogram import Histogram
from pennyweight.stats.ranges.base import RangeChooser
from pennyweight.stats.ranges.candidates import candidates

# Samples on which "output" looks at what consumers make of a value.
_SAMPLES = 32


@dataclass(frozen=True)
class EdgeRecord:
    """How one edge fared.

    source      the edge whose range it has
    chooser     what chose it
    low, high   of all numbers that calibration saw
    clipped     share of the numbers beyond the range, about
    """

    name: str
    source: str
    chooser: str
    low: float
    high: float
    clipped: float


@dataclass(frozen=True)
class Ranges:
    """parameters and records by value"""

    parameters: Mapping[str, ActivationParameters] = field(default_factory=dict)
    records: Mapping[str, EdgeRecord] = field(default_factory=dict)


def histograms(
    network: Network, batches: Sequence[Inputs], sources: Collection[str], shelf: Shelf | None
) -> dict[str, Histogram]:
    """Of the values `sources` over all batches. Raises DataError, which names the value, where one is not finite."""
    found = {name: Histogram.zero() for name in sources}
    walk = Walk(network, batches, shelf)
    for name, node in walk.nodes.items():
        if node.op == "output":
            continue
        for x in walk.advance(name):
            if name in found:
                found[name] = found[name].update(x, name=name)
    return found


def choose_ranges(
    network: Network,
    batches: Sequence[Inputs],
    edges: Sequence[Edge],
    scheme: ActivationScheme,
    *,
    chooser: str,
    shelf: Shelf | None = None,
) -> Ranges:
    """Of all `edges`; `network` computes the numbers that are rounded."""
    sources = list(dict.fromkeys(edge.source for edge in edges))
    seen = histograms(network, batches, sources, shelf)
    if chooser == OUTPUT:
        chosen = _by_output(network, some_samples(network, batches, _SAMPLES), seen, scheme)
    else:
        one: RangeChooser = find("stats.ranges", chooser)
        chosen = {name: one.choose(histogram, scheme) for name, histogram in seen.items()}
    records = {edge.value: _record(edge, chosen[edge.source], seen[edge.source], chooser) for edge in edges}
    return Ranges({edge.value: chosen[edge.source] for edge in edges}, records)


def _record(edge: Edge, chosen: ActivationParameters, seen: Histogram, chooser: str) -> EdgeRecord:
    # Half a step beyond the last value is still rounded to it.
    low, high = chosen.low - chosen.scale / 2, chosen.high + chosen.scale / 2
    start, stop = (bound.to(seen.counts.device) for bound in seen.bounds)
    beyond = int(seen.counts[(stop <= low) | (start >= high)].sum())
    return EdgeRecord(edge.value, edge.source, chooser, seen.low, seen.high, beyond / max(1, seen.count))


def _by_output(
    network: Network, batches: Sequence[Inputs], seen: Mapping[str, Histogram], scheme: ActivationScheme
) -> dict[str, ActivationParameters]:
    """For each value the candidate with which what its consumers give changes least, all else unrounded."""
    found: dict[str, ActivationParameters] = {}
    walk = Walk(network, batches)
    due: dict[str, list[tuple[str, Consumers]]] = {}
    for name in seen:
        consumers = consumers_of(network, name, seen)
        for held in (name, *consumers.reads, *consumers.ends):
            walk.hold(held)
        due.setdefault(consumers.nodes[-1] if consumers.nodes else name, []).append((name, consumers))
    for name, node in walk.nodes.items():
        if node.op == "output":
            continue
        walk.advance(name)
        for value, consumers in due.get(name, []):
            tried = candidates(seen[value], scheme)
            errors = [_output_error(walk, value, consumers, one) for one in tried]
            found[value] = tried[errors.index(min(errors))]
            for held in (value, *consumers.reads, *consumers.ends):
                walk.release(held)
    return found


def _output_error(walk: Walk, value: str, consumers: Consumers, parameters: ActivationParameters) -> float:
    """The sum over ends of |y - ŷ|² / |y|²; y as it is, ŷ with `value` rounded."""
    away = dict.fromkeys(consumers.ends, 0.0)
    total = dict.fromkeys(consumers.ends, 0.0)
    for batch, x in enumerate(walk.at[value]):
        values = walk.again(consumers.nodes, {value: parameters.round_trip(x).to(x.dtype)}, batch)
        for end in consumers.ends:
            y = walk.at[end][batch]
            away[end] += float((y - values[end]).square().sum(dtype=torch.float64))
            total[end] += float(y.square().sum(dtype=torch.float64))
    return sum(away[end] / total[end] for end in consumers.ends if total[end])
