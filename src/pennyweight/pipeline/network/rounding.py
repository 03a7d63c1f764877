"""All sites of a network rounded one after the other, each behind those that are rounded already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import DataError
from pennyweight.models.network.network import Inputs, Network, NetworkSite, with_weight
from pennyweight.pipeline.network.bias import add_bias_, channel_axis, function_behind, output_shift, shifted
from pennyweight.pipeline.network.moments import Collector, Moments
from pennyweight.pipeline.network.reading import Wanted, add_rows, moments_of
from pennyweight.pipeline.network.shelf import Shelf
from pennyweight.pipeline.network.sites import SiteSolver, SolvedWeight
from pennyweight.pipeline.network.walk import Walk
from pennyweight.pipeline.solve import check_finite
from pennyweight.schemes import QuantizedWeight, Scheme
from pennyweight.schemes.activation import ActivationParameters

Tell = Callable[[int, int], None]


def tell_nobody(done: int, total: int) -> None:
    """For callers that do not follow the work."""


@dataclass(frozen=True)
class SiteRecord:
    """How one site fared.

    error, error_nearest  see SolvedWeight
    output_error          |y - ŷ|² / |y|² of what the site gives, behind the function that follows it (ReLU): y in the
                          float network, ŷ where all before is rounded and its bias corrected; None where unseen
    rows                  rows of inputs that its Hessian was made of
    bias_shift            largest correction of its bias, None without one
    """

    name: str
    scheme: str
    error: float
    error_nearest: float
    output_error: float | None = None
    rows: int = 0
    bias_shift: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """schemes      site -> its scheme; those left out stay in float
    codes        of sites that are rounded already
    activations  value -> how its edge is rounded, as far as it is
    has_bias     whether biases are corrected
    """

    schemes: Mapping[str, Scheme]
    solver: SiteSolver
    codes: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    activations: Mapping[str, ActivationParameters] = field(default_factory=dict)
    has_bias: bool = True
    seed: int = 0


@dataclass(frozen=True)
class RoundedSites:
    """network  the float network with corrected biases; weights and records by site"""

    network: Network
    weights: Mapping[str, QuantizedWeight]
    records: Mapping[str, SiteRecord]


def round_sites(
    network: Network, batches: Sequence[Inputs], asked: Asked, shelf: Shelf | None = None, tell: Tell = tell_nobody
) -> RoundedSites:
    """Codes for the sites of `network` that have a scheme, and its biases corrected.

    The float network and the one that is being rounded are computed side by side, node after node. Raises WeightError
    and DataError, which name the site or the value, for numbers that are not finite.
    """
    work = _Work(network, batches, asked, shelf)
    names = [name for name, node in work.float.nodes.items() if node.op != "output"]
    for done, name in enumerate(names):
        work.step(name)
        tell(done + 1, len(names))
    return RoundedSites(work.corrected, work.weights, work.records)


class _Work:
    """The two networks on their way. `corrected` is the float one with the biases that go out."""

    def __init__(self, network: Network, batches: Sequence[Inputs], asked: Asked, shelf: Shelf | None) -> None:
        self.asked = asked
        self.corrected = network.copied()
        self.float, self.rounded = Walk(network, batches, shelf), Walk(network.copied(), batches, shelf)
        self.weights: dict[str, QuantizedWeight] = {}
        self.records: dict[str, SiteRecord] = {}
        self._first: dict[str, list[NetworkSite]] = {}
        for site in network.sites:
            if site.name in asked.schemes:
                self._first.setdefault(site.nodes[0], []).append(site)
        self._again = moments_of_float(network, batches, self._sites_called_again(), self._wanted(), shelf)
        # Nodes of rounded sites; and values that differ between the networks: others are computed once.
        self._rounded_nodes: set[str] = set()
        self._changed: set[str] = set()

    def step(self, name: str) -> None:
        """Compute one node in both networks, after the sites that it is the first to use were rounded."""
        sites = self._first.get(name, [])
        for site in sites:
            self._solve(site)
        original = self.float.advance(name)
        check_values(name, original)
        reads = {read.name for read in self.float.nodes[name].all_input_nodes}
        if reads & self._changed or name in self._rounded_nodes:
            self._changed.add(name)
            rounded = self.rounded.advance(name)
        else:
            rounded = self.rounded.adopt(name, original)
        for site in sites:
            rounded = self._look_at(site, name, original, rounded)
        if name in self.asked.activations:
            self._changed.add(name)
            parameters = self.asked.activations[name]
            self.rounded.put(name, [parameters.round_trip(value).to(value.dtype) for value in rounded])

    def _solve(self, site: NetworkSite) -> None:
        """Put codes in the place of the weight."""
        scheme = self.asked.schemes[site.name]
        w = site.matrix(self.float.network.weight(site).detach()).float()
        check_finite(w, site.parameter)
        known = self.asked.codes.get(site.name)
        moments = self._moments(site) if known is None else None
        solved = self._codes(site, w, scheme, moments) if known is None else SolvedWeight(known, 0.0, 0.0)
        self.weights[site.name] = solved.weight
        with_weight(site, self.rounded.network.graph, site.tensor(solved.weight.dequantize()))
        self._rounded_nodes.update(site.nodes)
        rows = 0 if moments is None else moments.rows
        self.records[site.name] = SiteRecord(
            site.name, scheme.name, solved.error, solved.error_nearest, rows=rows, notes=solved.notes
        )

    def _codes(self, site: NetworkSite, w: Tensor, scheme: Scheme, moments: Moments | None) -> SolvedWeight:
        solver = self.asked.solver
        if site.kind != "embedding" or moments is not None:
            return solver.solve(site, w, scheme, moments)
        counts = torch.zeros(w.shape[0])
        for args, _ in self.float.inputs(site.nodes[0]):
            counts += torch.bincount(args[0].flatten(), minlength=w.shape[0])
        return solver.of_embedding(w, scheme, counts)

    def _moments(self, site: NetworkSite) -> Moments | None:
        """Of what the site reads behind what was rounded before it."""
        if not self.asked.solver.solver.needs:
            return None
        if len(site.nodes) > 1:
            return self._again.get(site.name)
        rounded = self.rounded if self._changed else self.float
        return moments_of(site, site.nodes[0], rounded, self.float, self._wanted())

    def _wanted(self) -> Wanted:
        return Wanted("cross" in self.asked.solver.solver.needs, self.asked.seed)

    def _is_corrected(self, site: NetworkSite) -> bool:
        """Whether its bias is its own, and may be changed."""
        return self.asked.has_bias and len(site.nodes) == 1 and site.kind not in ("embedding", "recurrent")

    def _sites_called_again(self) -> list[NetworkSite]:
        needs = self.asked.solver.solver.needs
        return [site for sites in self._first.values() for site in sites if len(site.nodes) > 1 and needs]

    def _look_at(self, site: NetworkSite, name: str, original: list[Any], rounded: list[Any]) -> list[Any]:
        """Measure what the site gives; its bias is corrected, and what is then given comes back."""
        if site.kind in ("embedding", "recurrent") or not original:
            return rounded
        path = str(self.float.nodes[name].target)
        modules = [network.graph.get_submodule(path) for network in (self.corrected, self.rounded.network)]
        axis, behind = channel_axis(modules[0]), function_behind(self.float.nodes[name])
        shift = output_shift(original, rounded, axis, behind) if self._is_corrected(site) else None
        notes = self.records[site.name].notes
        if shift is not None and shift.any():
            notes = notes if modules[0].bias is not None else (*notes, "a bias was made for it")
            for module in modules:
                add_bias_(module, shift)
            rounded = [shifted(y, shift, axis) for y in rounded]
            self.rounded.put(name, rounded)
        self.records[site.name] = replace(
            self.records[site.name],
            output_error=relative_error(map(behind, original), map(behind, rounded)),
            bias_shift=None if shift is None else float(shift.abs().max()),
            notes=notes,
        )
        return rounded


def moments_of_float(
    network: Network, batches: Sequence[Inputs], sites: Sequence[NetworkSite], wanted: Wanted, shelf: Shelf | None
) -> dict[str, Moments]:
    """Of sites that are computed with several times: all that they read in the float network, for when the first use
    comes the others are still to come."""
    if not sites:
        return {}
    users: dict[str, list[NetworkSite]] = {}
    for site in sites:
        for name in site.nodes:
            users.setdefault(name, []).append(site)
    collectors = {site.name: Collector(site.groups, site.matrix_shape[1], has_cross=wanted.has_cross) for site in sites}
    walk, found = Walk(network, batches, shelf), set[str]()
    for name, node in walk.nodes.items():
        for site in users.get(name, []):
            if add_rows(collectors[site.name], site, name, walk, walk, wanted):
                found.add(site.name)
        if node.op != "output":
            walk.advance(name)
    return {name: collector.finished() for name, collector in collectors.items() if name in found}


def relative_error(original: Iterable[Tensor], rounded: Iterable[Tensor]) -> float:
    """|y - ŷ|² / |y|² over all batches, in float64 sums; 0 where y is."""
    total, away = 0.0, 0.0
    for y, other in zip(original, rounded, strict=True):
        total += float(y.square().sum(dtype=torch.float64))
        away += float((y - other).square().sum(dtype=torch.float64))
    return away / total if total else 0.0


def check_values(name: str, values: Sequence[Any]) -> None:
    """Raises DataError, which says `name`, where a value of some batch is NaN; masks may be infinite."""
    for batch, value in enumerate(values):
        if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
            raise DataError(
                f"{name}: {int(value.isnan().sum())} of {value.numel()} numbers are NaN in calibration batch {batch}; "
                "look for what makes them in that batch, or in the network before this value"
            )
