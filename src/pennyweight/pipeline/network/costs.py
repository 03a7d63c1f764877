"""What a network loses by each scheme that a site may get, and the choices that a budget has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pennyweight.containers.onnx import size_bytes
from pennyweight.core.errors import DataError
from pennyweight.models.network.network import Inputs, Network, NetworkSite, with_weight
from pennyweight.pipeline.network.options import Loss, NetworkOptions
from pennyweight.pipeline.network.planned import Refusals, decided_by
from pennyweight.pipeline.network.reading import Wanted, moments_of
from pennyweight.pipeline.network.rounding import moments_of_float
from pennyweight.pipeline.network.samples import some_samples
from pennyweight.pipeline.network.shelf import Shelf
from pennyweight.pipeline.network.sites import SiteSolver
from pennyweight.pipeline.network.walk import Walk
from pennyweight.pipeline.planning import Problem
from pennyweight.pipeline.solve import check_finite
from pennyweight.plan.candidates import Candidates, candidates
from pennyweight.plan.choices import Choice, Group
from pennyweight.schemes import Scheme
from pennyweight.solvers.gptq import Gptq

# Samples whose outputs are compared, and samples that calibrate the weights that are tried.
_COMPARED, _CALIBRATING = 64, 128
# What a budget chooses from: where activations are integers one scale a row alone gives products of integers.
_ROWS = ("int2-channel", "int4-channel", "int8-channel")
_GROUPS = (
    "int2-g64", "int2-g32", "int2-g16", "int4-g128", "int4-g64", "int4-g32", "int8-g128",
)  # fmt: skip
_LARGEST = torch.finfo(torch.float32).max

Tell = Callable[[int, int], None]


def network_problem(
    network: Network, batches: Sequence[Inputs], options: NetworkOptions, shelf: Shelf, tell: Tell
) -> Problem:
    """The choices of all sites of `network`, with exact sizes in the file and measured costs."""
    decided = decided_by(network, options)
    shapes = {site.name: site.matrix_shape for site in network.sites}
    activation = options.network_scheme.activation
    groups = candidates(
        shapes, fused=(), decided=decided, finish=lambda scheme: scheme.with_scale_dtype(torch.float32),
        why_not=Refusals(network, options), alphabet=_ROWS if activation is not None else (*_ROWS, *_GROUPS),
    )  # fmt: skip
    costs = measured_costs(network, batches, groups, loss=options.loss, seed=options.seed, shelf=shelf, tell=tell)

    def choice(name: str, scheme: Scheme | None, cost: float) -> Choice:
        site = network.site(name)
        if scheme is None:
            return Choice(None, network.weight(site).nbytes, cost)
        return Choice(scheme, size_bytes(scheme, site, options.runtime, activation=activation), cost)

    found = [
        Group(one.sites, tuple(choice(one.sites[0], scheme, costs[one.sites[0], scheme]) for scheme in one.schemes))
        for one in groups
    ]
    weights = sum(tensor.numel() for tensor in network.graph.parameters())
    return Problem(found, _bytes_of_others(network), weights, decided)


def _bytes_of_others(network: Network) -> int:
    """Of parameters that are no sites' weights, and buffers."""
    own = {id(network.weight(site)) for site in network.sites}
    rest = [tensor for tensor in (*network.graph.parameters(), *network.graph.buffers()) if id(tensor) not in own]
    return sum(tensor.nbytes for tensor in rest)


def measured_costs(
    network: Network,
    batches: Sequence[Inputs],
    groups: Sequence[Candidates],
    *,
    loss: Loss | None = None,
    seed: int = 0,
    shelf: Shelf | None = None,
    tell: Tell = lambda done, total: None,
) -> dict[tuple[str, Scheme | None], float]:
    """What the outputs of `network` lose on a few samples where one site alone is rounded to one of its schemes.

    "kl": the mean over rows of KL(softmax(y) || softmax(ŷ)) in nats; "error": |y - ŷ|² / |y|². None is the first where
    the network gives one matrix [samples, classes]. The weights that are tried are those of GPTQ. All that comes before
    the site is computed once.
    """
    return _Measuring(network, batches, groups, loss, seed, shelf).all(tell)


@dataclass(frozen=True)
class Outputs:
    """The outputs of the float network on some batches, and how others are compared with them."""

    batches: Sequence[Inputs]
    outputs: Sequence[Sequence[Tensor]]
    loss: Loss

    @staticmethod
    def of(network: Network, batches: Sequence[Inputs], loss: Loss | None) -> Outputs:
        outputs = _all_outputs(network.graph, batches)
        if not outputs or not outputs[0]:
            raise DataError("a budget compares outputs of the network: give calibration batches, and return floats")
        is_logits = len(outputs[0]) == 1 and outputs[0][0].dim() == 2 and outputs[0][0].shape[1] > 1
        return Outputs(batches, outputs, loss or ("kl" if is_logits else "error"))

    def of_module(self, module: nn.Module) -> float:
        """The cost of what `module` gives."""
        return self.cost(_all_outputs(module, self.batches))

    def cost(self, others: Sequence[Sequence[Tensor]]) -> float:
        """Never negative, and finite: the largest float32 number for outputs that are no numbers any more."""
        pairs = [pair for ys, zs in zip(self.outputs, others, strict=True) for pair in zip(ys, zs, strict=True)]
        if self.loss == "kl":
            rows = sum(y.numel() // y.shape[-1] for y, _ in pairs)
            found = sum(_divergence(y, z) for y, z in pairs) / max(1, rows)
        else:
            total = sum(float(y.double().square().sum()) for y, _ in pairs)
            found = sum(float((y.double() - z.double()).square().sum()) for y, z in pairs) / (total or 1.0)
        return min(max(found, 0.0), _LARGEST) if math.isfinite(found) else _LARGEST


def _all_outputs(module: nn.Module, batches: Sequence[Inputs]) -> list[list[Tensor]]:
    with torch.no_grad():
        return [_floats(module(*batch.args, **batch.kwargs)) for batch in batches]


def _floats(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _divergence(y: Tensor, z: Tensor) -> float:
    p, q = y.double().log_softmax(-1), z.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


class _Measuring:
    """Two walks side by side: one whose samples calibrate, one whose samples are compared."""

    def __init__(
        self, network: Network, batches: Sequence[Inputs], groups: Sequence[Candidates], loss: Loss | None, seed: int,
        shelf: Shelf | None,
    ) -> None:  # fmt: skip
        compared = some_samples(network, batches, _COMPARED)
        calibrating = some_samples(network, batches, _CALIBRATING)
        self._network = network.copied()
        self._reference = Outputs.of(network, compared, loss)
        self._calibrating, self._compared = Walk(network, calibrating, shelf), Walk(self._network, compared, shelf)
        self._schemes = {name: one.schemes for one in groups for name in one.sites}
        self._sites: dict[str, list[NetworkSite]] = {}
        for site in network.sites:
            self._sites.setdefault(site.nodes[0], []).append(site)
        self._seed = seed
        again = [site for site in network.sites if len(site.nodes) > 1]
        self._again = moments_of_float(network, calibrating, again, Wanted(seed=seed), shelf)
        self._solver = SiteSolver(Gptq())

    def all(self, tell: Tell) -> dict[tuple[str, Scheme | None], float]:
        costs: dict[tuple[str, Scheme | None], float] = {}
        names = [name for name, node in self._compared.nodes.items() if node.op != "output"]
        for done, name in enumerate(names):
            for site in self._sites.get(name, []):
                costs |= self._of_site(site, names[done:])
            self._calibrating.advance(name)
            self._compared.advance(name)
            tell(done + 1, len(names))
        return costs

    def _of_site(self, site: NetworkSite, rest: Sequence[str]) -> dict[tuple[str, Scheme | None], float]:
        original = self._network.weight(site).detach().clone()
        w = site.matrix(original).float()
        check_finite(w, site.parameter)
        schemes = [scheme for scheme in self._schemes[site.name] if scheme is not None]
        wanted = Wanted(seed=self._seed)
        moments = self._again.get(site.name) if len(site.nodes) > 1 else None
        if len(site.nodes) == 1 and schemes:
            moments = moments_of(site, site.nodes[0], self._calibrating, self._calibrating, wanted)
        costs: dict[tuple[str, Scheme | None], float] = {(site.name, None): 0.0}
        for scheme in schemes:
            weight = self._solver.solve(site, w, scheme, moments).weight
            with_weight(site, self._network.graph, site.tensor(weight.dequantize()))
            costs[site.name, scheme] = self._reference.cost(self._outputs(rest))
        with_weight(site, self._network.graph, original)
        return costs

    def _outputs(self, rest: Sequence[str]) -> list[list[Tensor]]:
        return [_floats(self._compared.result(rest, batch)) for batch in range(self._compared.batches)]
