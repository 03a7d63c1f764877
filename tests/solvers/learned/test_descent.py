from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.learned.base import BlockProblem
from pennyweight.solvers.learned.descent import block_error, descend, drawn_batches, gradients
from tests.solvers.learned.blocks import error_in_float64, toy


def test_every_batch_is_drawn_once_before_any_is_drawn_again() -> None:
    for count, batches in ((7, 3), (5, 5), (3, 8)):
        drawn = list(drawn_batches(count, batches, 4 * count, 0))
        assert all(len(step) == batches for step in drawn)
        flat = [batch for step in drawn for batch in step]
        for order in range(len(flat) // count):
            assert sorted(flat[order * count : (order + 1) * count]) == list(range(count))


def test_the_order_depends_on_the_seed_alone() -> None:
    assert list(drawn_batches(9, 2, 9, 1)) == list(drawn_batches(9, 2, 9, 1)) != list(drawn_batches(9, 2, 9, 2))


def test_gradients_are_the_slopes_of_the_error() -> None:
    problem = toy()
    weights = {site: weight.dequantize() for site, weight in problem.start.items()}
    elements = sum(target.numel() for target in problem.targets)
    found = gradients(problem, weights, range(len(problem.targets)))
    generator = torch.Generator().manual_seed(1)
    for (site, weight), slope in zip(weights.items(), found, strict=True):
        along = torch.randn(weight.shape, generator=generator)
        ends = [
            error_in_float64(problem, {**weights, site: weight.double() + step * along.double()})
            for step in (1e-4, -1e-4)
        ]
        assert elements * (ends[0] - ends[1]) / 2e-4 == pytest.approx(float((slope * along).sum()), rel=1e-3)


def test_gradients_of_several_batches_are_added_in_order_by_any_number_of_threads() -> None:
    problem = toy(batches=7)
    weights = {site: weight.dequantize() for site, weight in problem.start.items()}
    expected = [torch.zeros_like(weight) for weight in weights.values()]
    with one_thread_per_operation():
        for batch in (3, 0, 6, 2, 5):
            expected = [a + b for a, b in zip(expected, gradients(problem, weights, [batch]), strict=True)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for mine, theirs in zip(gradients(problem, weights, [3, 0, 6, 2, 5]), expected, strict=True):
                assert torch.equal(mine, theirs)
    finally:
        torch.set_num_threads(before)


class Script:
    """Stands for a site whose codes after each step are written down beforehand."""

    def __init__(self, stages: list[QuantizedWeight]) -> None:
        self.stages, self.now = stages, 0

    def weight(self) -> Tensor:
        return self.quantized().dequantize()

    def quantized(self) -> QuantizedWeight:
        return self.stages[self.now]

    def step_(self, gradient: Tensor, step: int, steps: int) -> None:
        assert (step, steps) == (self.now, len(self.stages) - 1)
        self.now += 1


def scripted(problem: BlockProblem, order: list[int]) -> Script:
    """Stages of site "a": a smaller number is nearer to the original."""
    start = problem.start["a"]
    stages = [replace(start, codes=start.codes.clone()) for _ in order]
    for stage, badness in zip(stages, order, strict=True):
        stage.codes[:badness] = 0
    return Script(stages)


@pytest.mark.parametrize(
    ("order", "looks", "best"),
    [
        ([3, 4, 2, 1, 5], 4, 3),
        ([3, 4, 2, 1, 5], 2, 2),
        ([1, 4, 2, 3, 5], 4, 0),
        ([5, 1, 4, 3, 2], 4, 1),
        ([3, 1, 4, 5, 2], 1, 4),
    ],
)
def test_the_best_codes_seen_are_kept(order: list[int], looks: int, best: int) -> None:
    problem = replace(toy(), start={"a": toy().start["a"]})
    script = scripted(problem, order)
    problem = replace(problem, start={"a": script.stages[0]})
    solution = descend(problem, {"a": script}, steps=4, batches=1, looks=looks)
    assert torch.equal(solution.weights["a"].codes, script.stages[best].codes)
    assert solution.error == block_error(problem, {"a": script.stages[best]})
    assert bool(solution.notes) == (best == 0)


def test_batches_of_different_sizes_count_by_their_elements() -> None:
    problem = toy(batches=2)
    targets = [problem.targets[0], problem.targets[1][:, :10]]

    def forward(weights: dict[str, Tensor], batch: int) -> Tensor:
        return problem.forward(weights, batch)[:, : targets[batch].shape[1]]

    uneven = replace(problem, targets=targets, forward=forward)
    decoded = {site: weight.dequantize() for site, weight in problem.start.items()}
    errors = [(forward(decoded, batch) - target).square().flatten() for batch, target in enumerate(targets)]
    assert block_error(uneven, problem.start) == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)


def test_each_step_runs_the_block_on_its_own_batches_only() -> None:
    problem = toy(batches=6)
    ran: Counter[int] = Counter()

    def forward(weights: dict[str, Tensor], batch: int) -> Tensor:
        ran[batch] += torch.is_grad_enabled()
        return problem.forward(weights, batch)

    script = Script([problem.start["a"]] * 4)
    descend(
        replace(problem, start={"a": script.stages[0]}, forward=forward), {"a": script}, steps=3, batches=2, looks=1
    )
    assert ran == Counter(range(6))
