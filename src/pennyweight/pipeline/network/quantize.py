"""A network in memory, quantized after training: the steps in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pennyweight.containers.onnx import edges_of
from pennyweight.core.registry import find
from pennyweight.models.network import Network, QuantizedNetwork, fold_batch_norms
from pennyweight.models.network.network import Inputs
from pennyweight.pipeline.network.activations import EdgeRecord, Ranges, choose_ranges
from pennyweight.pipeline.network.costs import Outputs, network_problem
from pennyweight.pipeline.network.equalize import EqualizationReport, equalized
from pennyweight.pipeline.network.options import NetworkOptions
from pennyweight.pipeline.network.planned import uniform_network_plan, with_edges
from pennyweight.pipeline.network.reconstruct import BlockError, reconstructed
from pennyweight.pipeline.network.rounding import Asked, RoundedSites, SiteRecord, round_sites
from pennyweight.pipeline.network.shelf import Shelf, shelf
from pennyweight.pipeline.network.sites import SiteSolver
from pennyweight.pipeline.options import with_field
from pennyweight.pipeline.planning import Problem
from pennyweight.plan.budget import Budget
from pennyweight.plan.plan import Plan
from pennyweight.schemes import PerTensor, QuantizedWeight
from pennyweight.solvers.base import Solver

# One batch in so many judges what blocks have learned from the others.
_HELD = 4

# What is being done, how much of it is done, and of how much.
Tell = Callable[[str, int, int], None]


def tell_nobody(step: str, done: int, total: int) -> None:
    """For callers that do not follow the work."""


@dataclass(frozen=True)
class Prepared:
    """network  with batch norms folded and perhaps equalized: what plans are made for
    equalization  what that did, None where it was left out
    """

    network: Network
    equalization: EqualizationReport | None = None


@dataclass(frozen=True)
class NetworkResult:
    """sites, edges  how each fared, by name
    blocks        squared error of each block's output before and after its reconstruction
    notes         of the network as a whole
    seconds       by step
    """

    quantized: QuantizedNetwork
    sites: Mapping[str, SiteRecord]
    edges: Mapping[str, EdgeRecord] = field(default_factory=dict)
    blocks: Mapping[str, BlockError] = field(default_factory=dict)
    equalization: EqualizationReport | None = None
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


def quantize_network(
    network: Network, batches: Sequence[Inputs], options: NetworkOptions, tell: Tell = tell_nobody
) -> NetworkResult:
    """Codes for the weights of `network` and ranges for its edges, as `options` ask; `batches` calibrate, and may be
    none where nothing needs them.

    Raises UsageError for options that exclude each other or need data, BudgetError for a budget that no plan meets,
    WeightError and DataError, which name the site or the value, for numbers that are not finite.
    """
    options.check(has_data=bool(batches))
    prepared = prepare(network, batches, options)
    if options.budget is None:
        plan = uniform_network_plan(prepared.network, options)
    else:
        plan = budget_plan(prepared, problem_of(prepared, batches, options, tell), options.budget, options)
    return quantize_planned(prepared, batches, options, plan, tell)


def prepare(network: Network, batches: Sequence[Inputs], options: NetworkOptions) -> Prepared:
    """The same function in weights that round better."""
    folded = fold_batch_norms(network)
    is_per_tensor = isinstance(options.network_scheme.weight.granularity, PerTensor)
    if options.equalize is False or (options.equalize is None and not is_per_tensor):
        return Prepared(folded)
    return Prepared(*equalized(folded, batches or None))


def problem_of(
    prepared: Prepared, batches: Sequence[Inputs], options: NetworkOptions, tell: Tell = tell_nobody
) -> Problem:
    """What a budget chooses from: measured once, it serves any number of budgets; its frontier has the best plans."""
    with shelf(options.memory_bytes) as kept:
        return network_problem(prepared.network, batches, options, kept, lambda *done: tell("costs", *done))


def budget_plan(prepared: Prepared, problem: Problem, budget: Budget, options: NetworkOptions) -> Plan:
    """The best plan whose tensors take no more than `budget` says; raises BudgetError."""
    size_bytes = int(budget.value if budget.kind == "size" else budget.value * problem.weights / 8)
    plan = problem.plan(problem.allocated(size_bytes).schemes(problem.groups))
    return with_edges(prepared.network, plan, options)


def quantize_planned(
    prepared: Prepared, batches: Sequence[Inputs], options: NetworkOptions, plan: Plan, tell: Tell = tell_nobody
) -> NetworkResult:
    """The codes and ranges of one plan."""
    with shelf(options.memory_bytes) as kept:
        return _Run(prepared, batches, options, plan, kept, tell).result()


class _Run:
    """One plan on its way."""

    def __init__(
        self,
        prepared: Prepared,
        batches: Sequence[Inputs],
        options: NetworkOptions,
        plan: Plan,
        kept: Shelf,
        tell: Tell,
    ) -> None:
        self._network, self._prepared, self._batches = prepared.network, prepared, batches
        self._options, self._plan, self._shelf, self._tell = options, plan, kept, tell
        self._steps = options.steps(has_data=bool(batches))
        self._seconds: dict[str, float] = {}
        self._notes: list[str] = []

    def result(self) -> NetworkResult:
        """Ranges, then weights behind them, then blocks."""
        with self._timed("ranges"):
            ranges = self._ranges()
        with self._timed("weights"):
            rounded = self._rounded(ranges, {})
        blocks: Mapping[str, BlockError] = {}
        if self._steps.refine:
            rounded, blocks = self._refined(rounded, ranges)
        quantized = self._quantized(rounded, ranges)
        return NetworkResult(
            quantized, rounded.records, ranges.records, blocks, self._prepared.equalization, tuple(self._notes),
            dict(self._seconds),
        )  # fmt: skip

    def _ranges(self) -> Ranges:
        schemes = {scheme for scheme in self._plan.edges.values() if not scheme.is_dynamic}
        if not schemes:
            return Ranges()
        [scheme] = schemes
        edges = [edge for edge in edges_of(self._network, sites=self._plan.schemes) if edge.value in self._plan.edges]
        return choose_ranges(
            self._network, self._batches, edges, scheme, chooser=self._options.ranges, shelf=self._shelf
        )

    def _quantized(self, rounded: RoundedSites, ranges: Ranges) -> QuantizedNetwork:
        return QuantizedNetwork(rounded.network, rounded.weights, ranges.parameters, self._plan)

    def _rounded(self, ranges: Ranges, codes: Mapping[str, QuantizedWeight]) -> RoundedSites:
        solver: Solver = with_field(find("solvers", self._steps.solver), "fit", self._steps.fit)
        asked = Asked(
            self._plan.schemes, SiteSolver(solver, self._steps.fit), codes, ranges.parameters,
            self._steps.correct_bias, self._options.seed,
        )  # fmt: skip
        return round_sites(self._network, self._batches, asked, self._shelf, lambda *done: self._tell("weights", *done))

    def _refined(self, rounded: RoundedSites, ranges: Ranges) -> tuple[RoundedSites, Mapping[str, BlockError]]:
        """With codes that blocks have learned, if the network's outputs are nearer with them on samples that they have
        not learned from; what was there before otherwise."""
        held = len(self._batches) // _HELD
        learning, judging = self._batches[: len(self._batches) - held], self._batches[len(self._batches) - held :]
        with self._timed("blocks"):
            found = reconstructed(
                self._network, rounded.weights, ranges.parameters, learning, steps=self._steps.refine,
                seed=self._options.seed, tell=lambda *done: self._tell("blocks", *done),
            )  # fmt: skip
        with self._timed("biases"):
            again = self._rounded(ranges, found.weights)
        self._notes += found.notes
        again = replace(again, records=_merged(rounded.records, again.records))
        if not held:
            return again, found.blocks
        outputs = Outputs.of(self._network, judging, self._options.loss)
        before, after = (outputs.of_module(self._quantized(one, ranges).simulated()) for one in (rounded, again))
        if after < before:
            return again, found.blocks
        self._notes.append(
            f"learned rounding of blocks was left out: on samples held back the outputs lost {after:.3g} with it, "
            f"{before:.3g} without"
        )
        return rounded, {}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[step] = self._seconds.get(step, 0.0) + time.perf_counter() - started


def _merged(before: Mapping[str, SiteRecord], after: Mapping[str, SiteRecord]) -> dict[str, SiteRecord]:
    """How the sites fared in the end, with what was found when they were solved first."""
    return {
        name: replace(
            before[name], output_error=record.output_error, bias_shift=record.bias_shift,
            notes=tuple(dict.fromkeys((*before[name].notes, *record.notes))),
        )
        for name, record in after.items()
    }  # fmt: skip
