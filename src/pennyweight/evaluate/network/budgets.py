"""What a quantized network may take or lose, and the result that keeps to it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from pennyweight.containers.onnx import write_onnx
from pennyweight.core.errors import BudgetError, UsageError
from pennyweight.evaluate.network.loss import (
    FunctionJudge,
    LabelledJudge,
    NetworkJudge,
    NetworkTrial,
    smallest_that_holds,
)
from pennyweight.models.network import Network, QuantizedNetwork, batches_of
from pennyweight.models.network.network import Inputs
from pennyweight.pipeline.network.options import NetworkOptions
from pennyweight.pipeline.network.planned import with_edges
from pennyweight.pipeline.network.quantize import (
    NetworkResult,
    Tell,
    budget_plan,
    prepare,
    problem_of,
    quantize_network,
    quantize_planned,
)
from pennyweight.plan.budget import Budget, parse_budget
from pennyweight.plan.frontier import Point
from pennyweight.plan.plan import Plan
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest

# What lies beside the tensors in a file depends on the plan, so that it takes a few to know.
_ATTEMPTS = 10


@dataclass(frozen=True)
class NetworkBudget:
    """limit     of bytes or bits a weight, None without one
    max_loss  points of accuracy that may be lost, None without such a budget; evaluate: what says how many are
    name      as the user said it
    """

    limit: Budget | None = None
    max_loss: float | None = None
    evaluate: Any = None
    name: str | None = None

    @staticmethod
    def of(*, size: str | int | None, bpw: float | None, max_loss: float | None, evaluate: Any) -> NetworkBudget:
        """Raises UsageError for two budgets, and for one of accuracy without a judge."""
        limit = parse_budget(size=size, bpw=bpw)
        if max_loss is None:
            if evaluate is not None:
                raise UsageError("evaluate judges a budget of accuracy: give max_loss with it")
            return NetworkBudget(limit, name=None if limit is None else f"{limit.kind}={limit.value:g}")
        if limit is not None:
            raise UsageError("max_loss and a size exclude each other: give one budget")
        if not 0 < max_loss <= 100:
            raise UsageError(f"max_loss={max_loss}: give points of accuracy, above 0 and at most 100")
        if evaluate is None:
            raise UsageError(
                "max_loss needs a judge: give evaluate, a loader of labelled batches or a function of a module that "
                "gives accuracy in per cent"
            )
        return NetworkBudget(max_loss=max_loss, evaluate=evaluate, name=f"max_loss={max_loss:g}")

    @property
    def most_bytes(self) -> int | None:
        """That the file may take, where its size is limited."""
        return int(self.limit.value) if self.limit is not None and self.limit.kind == "size" else None

    def judge(self, network: Network) -> NetworkJudge:
        """Raises DataError for what cannot judge."""
        assert self.max_loss is not None
        if callable(self.evaluate) and not isinstance(self.evaluate, Iterable):
            return FunctionJudge.of(network.graph, self.evaluate)
        batches = batches_of(self.evaluate, network, needs_labels=True)
        return LabelledJudge.of(network.graph, batches, self.max_loss)


def result_within(
    network: Network, batches: Sequence[Inputs], options: NetworkOptions, budget: NetworkBudget, tell: Tell
) -> tuple[NetworkResult, tuple[NetworkTrial, ...]]:
    """The network quantized within its budget, and the plans that were tried for it."""
    if budget.max_loss is not None:
        return _within_loss(network, batches, options, budget, tell)
    if budget.limit is None:
        return quantize_network(network, batches, options, tell), ()
    if budget.limit.kind == "size":
        return _within_size(network, batches, options, budget.limit, tell), ()
    return quantize_network(network, batches, replace(options, budget=budget.limit), tell), ()


def _within_loss(
    network: Network, batches: Sequence[Inputs], options: NetworkOptions, budget: NetworkBudget, tell: Tell
) -> tuple[NetworkResult, tuple[NetworkTrial, ...]]:
    assert budget.max_loss is not None
    judge = budget.judge(network)
    # A budget of anything asks for data.
    replace(options, budget=Budget("bpw", 8.0)).check(has_data=bool(batches))
    prepared = prepare(network, batches, options)
    problem = problem_of(prepared, batches, options, tell)
    made: dict[Point, NetworkResult] = {}

    def make(point: Point) -> nn.Module:
        plan = with_edges(prepared.network, problem.plan(problem.frontier.schemes(point)), options)
        made[point] = quantize_planned(prepared, batches, options, plan, tell)
        return made[point].quantized.simulated()

    points = [point for point in problem.frontier.points if any(scheme is not None for scheme in point.schemes)]
    chosen = smallest_that_holds(points, budget.max_loss, judge, make)
    result = made[chosen.point]
    return replace(result, notes=(*result.notes, f"max_loss judged by {judge.about}")), chosen.trials


def _within_size(
    network: Network, batches: Sequence[Inputs], options: NetworkOptions, limit: Budget, tell: Tell
) -> NetworkResult:
    """The best whose file takes no more than `limit`: planned for that many bytes of tensors, and again for what the
    file left them, as long as it is too large. Raises BudgetError."""
    replace(options, budget=limit).check(has_data=bool(batches))
    prepared = prepare(network, batches, options)
    problem = problem_of(prepared, batches, options, tell)
    size_bytes = tensors = int(limit.value)
    for _ in range(_ATTEMPTS):
        try:
            plan = budget_plan(prepared, problem, replace(limit, value=float(tensors)), options)
        except BudgetError as error:
            raise BudgetError(size_bytes, error.smallest + size_bytes - tensors, error.advice) from error
        over = _file_bytes(_sketched(prepared.network, plan), options) - size_bytes
        if over <= 0:
            return quantize_planned(prepared, batches, options, plan, tell)
        tensors = problem.of(plan)[0] - over
    raise BudgetError(size_bytes, size_bytes + over, "the file's graph takes the rest")


def _sketched(network: Network, plan: Plan) -> QuantizedNetwork:
    """`plan` with whatever codes: the bytes of a file do not depend on them."""
    weights = {
        site.name: Nearest("minmax")
        .solve(site.matrix(network.weight(site).detach()).float(), plan.schemes[site.name], Statistics())
        .weight
        for site in network.sites
        if site.name in plan.schemes
    }
    static = {name: scheme.parameters(-1.0, 1.0) for name, scheme in plan.edges.items() if not scheme.is_dynamic}
    return QuantizedNetwork(network, weights, static, plan)


def _file_bytes(quantized: QuantizedNetwork, options: NetworkOptions) -> int:
    with tempfile.TemporaryDirectory() as directory:
        return write_onnx(quantized, Path(directory) / "model.onnx", runtime=options.runtime).file_bytes
