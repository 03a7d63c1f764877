"""What every solver of a whole block that is provided must do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pennyweight.core.registry import provided
from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.learned.base import BlockProblem, BlockSolution, BlockSolver
from tests.solvers.learned.blocks import error_in_float64, toy, without

# Few steps: blocks this small are learned quickly.
SOLVERS = [solver.with_steps(20, batches=2) for solver in provided("solvers.learned").values()]
ELEMENTS = [element.name for element in provided("formats").values() if element.smallest <= 0]
NAMES = [
    "int4-g16-f16",
    "int3-g16-asym-bf16",
    "int2-channel-f32",
    "int4-tensor-f32",
    "uint4-g16-asym-f16",
    "uint4-g16-fzero-f16",
    "uint4-g16-offset-f16",
    "uint4-g16-offset=uint6x2.f16-uint6x2.f16",
    "mxfp4",
    "mxfp4_ggml",
    "nvfp4",
    *(f"{name}-g16-f16" for name in ELEMENTS),
]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: str(solver.name))
every_scheme = pytest.mark.parametrize("name", NAMES)
# The error is reported of outputs and sums in float32, and measured here with weights in float64.
CLOSE = 1e-4
# Of the error of rounding to nearest, which is the start; 0.35 to 0.63 are reached.
LARGEST_SHARE, MEAN_SHARE = 0.75, 0.65


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Blocks this small are solved faster by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refine(solver: BlockSolver, problem: BlockProblem) -> BlockSolution:
    """Solved by `solver`, checked for what any solution must be."""
    solution = solver.refine(problem)
    assert solution.weights.keys() == problem.start.keys()
    for name, weight in solution.weights.items():
        start = problem.start[name]
        assert weight.scheme == start.scheme
        assert (weight.codes.dtype, weight.shape) == (torch.uint8, start.shape)
        assert weight.codes.is_contiguous()
        assert weight.scales.is_contiguous()
        assert weight.dequantize().isfinite().all()
        assert torch.equal(weight.scheme.element.nearest(values(weight)), values(weight))
    assert solution.error <= solution.error_before
    for weights, error in ((problem.start, solution.error_before), (solution.weights, solution.error)):
        measured = error_in_float64(problem, {name: weight.dequantize() for name, weight in weights.items()})
        assert error == pytest.approx(measured, rel=CLOSE, abs=1e-12)
    return solution


def values(weight: QuantizedWeight) -> Tensor:
    return weight.scheme.element.decode(weight.codes)


def assert_same(one: BlockSolution, other: BlockSolution) -> None:
    assert one.error == other.error
    for name, weight in one.weights.items():
        assert torch.equal(weight.codes, other.weights[name].codes)
        for mine, theirs in zip(tensors(weight), tensors(other.weights[name]), strict=True):
            assert torch.equal(mine, theirs)


def tensors(weight: QuantizedWeight) -> list[Tensor]:
    found = (weight.codes, weight.scales, weight.zeros, weight.offsets, weight.parents, weight.offset_parents)
    return [tensor for tensor in found if tensor is not None]


@every_solver
@every_scheme
def test_the_result_is_stored_codes_and_its_error_never_above_the_starts(solver: BlockSolver, name: str) -> None:
    refine(solver, toy(name, batches=3))


@every_solver
@pytest.mark.parametrize("name", ["int2-g16-f16", "int3-channel-asym-bf16", "nf4-g16-f16", "fp4_e2m1-g16-f16"])
def test_the_error_falls_clearly_on_every_one_of_many_blocks(solver: BlockSolver, name: str) -> None:
    shares = []
    for seed in range(4):
        solution = refine(solver, toy(name, seed=seed))
        shares.append(solution.error / solution.error_before)
        assert not solution.notes
    assert max(shares) < LARGEST_SHARE
    assert sum(shares) / len(shares) < MEAN_SHARE


@every_solver
def test_neither_the_number_of_threads_nor_a_second_run_changes_a_bit(solver: BlockSolver) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(refine(solver, toy()))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(found[0], other)


@every_solver
def test_another_seed_is_another_order_of_batches(solver: BlockSolver) -> None:
    problem = toy(batches=20)
    assert refine(solver, problem).error != refine(solver, replace(problem, seed=1)).error


@every_solver
def test_no_argument_is_edited(solver: BlockSolver) -> None:
    problem, untouched = toy("uint4-g16-asym-f16"), toy("uint4-g16-asym-f16")
    refine(solver, problem)
    for name, start in problem.start.items():
        assert torch.equal(problem.weights[name], untouched.weights[name])
        for mine, theirs in zip(tensors(start), tensors(untouched.start[name]), strict=True):
            assert torch.equal(mine, theirs)
    for one, other in zip(problem.targets, untouched.targets, strict=True):
        assert torch.equal(one, other)


@every_solver
@pytest.mark.parametrize("kept", ["a", "b"])
def test_a_site_that_is_left_out_keeps_the_blocks_own_weight(solver: BlockSolver, kept: str) -> None:
    solution = refine(solver, without(toy(), kept))
    assert solution.error < solution.error_before
    assert kept not in solution.weights


@every_solver
def test_sites_of_different_schemes_are_learned_together(solver: BlockSolver) -> None:
    one, other = toy("int2-g16-f16"), toy("nf4-channel-f32")
    mixed = replace(one, start={"a": one.start["a"], "b": other.start["b"]})
    solution = refine(solver, mixed)
    assert solution.error < solution.error_before


@every_solver
def test_what_a_channel_counts_decides_where_the_error_goes(solver: BlockSolver) -> None:
    solver = solver.with_steps(60, batches=2)
    problem = toy("int2-g16-f16")
    counts = torch.ones(16)
    counts[:8] = 1e-4

    def errors(solution: BlockSolution) -> Tensor:
        decoded = {name: weight.dequantize() for name, weight in solution.weights.items()}
        found = [problem.forward(decoded, batch) - target for batch, target in enumerate(problem.targets)]
        return torch.cat(found, 1).square().mean((0, 1))

    even = errors(solver.refine(problem))
    weighted = errors(solver.refine(replace(problem, output_weight=counts)))
    assert weighted[8:].sum() < even[8:].sum()
    assert weighted[:8].sum() > even[:8].sum()


@every_solver
def test_a_block_without_error_or_data_or_sites_keeps_its_codes(solver: BlockSolver) -> None:
    problem = toy()
    decoded = {name: weight.dequantize() for name, weight in problem.start.items()}
    exact = [problem.forward(decoded, batch) for batch in range(len(problem.targets))]
    for given in (replace(problem, targets=exact), replace(problem, targets=[]), replace(problem, start={})):
        solution = solver.refine(given)
        assert solution.error == solution.error_before
        for name, weight in solution.weights.items():
            assert torch.equal(weight.codes, problem.start[name].codes)
            assert torch.equal(weight.scales, problem.start[name].scales)
        assert solution.notes


@every_solver
def test_inputs_that_overflow_leave_the_start(solver: BlockSolver) -> None:
    problem = toy()
    broken = replace(problem, targets=[target * math.inf for target in problem.targets])
    for name, weight in solver.refine(broken).weights.items():
        assert torch.equal(weight.codes, problem.start[name].codes)


@every_solver
def test_the_caller_is_told_of_every_step(solver: BlockSolver) -> None:
    told: list[tuple[int, int]] = []
    refine(solver, replace(toy(), tell=lambda done, total: told.append((done, total))))
    assert told == [(step + 1, told[0][1]) for step in range(told[0][1])]


@every_solver
def test_gradients_are_found_where_the_caller_records_none(solver: BlockSolver) -> None:
    with torch.no_grad():
        inside = refine(solver, toy())
    assert_same(inside, refine(solver, toy()))
    assert not inside.weights["a"].scales.requires_grad


@every_solver
def test_a_solver_has_its_own_name(solver: BlockSolver) -> None:
    assert provided("solvers.learned")[solver.name].with_steps(20, batches=2) == solver
