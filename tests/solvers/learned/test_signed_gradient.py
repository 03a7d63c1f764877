from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pennyweight.schemes import QuantizedWeight, parse_scheme
from pennyweight.solvers.learned.base import BlockProblem
from pennyweight.solvers.learned.descent import gradients
from pennyweight.solvers.learned.directions import Moments
from pennyweight.solvers.learned.signed_gradient import Offsets, SignedGradient, between
from tests.solvers.learned.blocks import toy

SIGN = SignedGradient(rule="sign", steps=4, reach=0.8, scale_reach=0.02, lean=0.7)
# float32 against float64.
CLOSE = 1e-5


def linear(seed: int) -> tuple[BlockProblem, np.ndarray]:
    """y = x Wᵀ, W [3, 8] with two groups a row, some of them with negative scales; and x [6, 8] in float64."""
    generator = np.random.default_rng(seed)
    w, x = generator.normal(size=(3, 8)), generator.normal(size=(6, 8))
    scales = generator.uniform(0.2, 0.5, size=(3, 2)) * generator.choice([-1, 1], size=(3, 2))
    codes = generator.integers(0, 8, size=(3, 8))
    inputs = torch.tensor(x, dtype=torch.float32)[None]

    def forward(weights: dict[str, Tensor], batch: int) -> Tensor:
        return inputs @ weights["w"].T

    start = QuantizedWeight(
        torch.tensor(codes, dtype=torch.uint8),
        torch.tensor(scales, dtype=torch.float32),
        None,
        parse_scheme("int3-g4-f32"),
    )
    weights = {"w": torch.tensor(w, dtype=torch.float32)}
    return BlockProblem(weights, {"w": start}, forward, [inputs @ weights["w"].T]), x  # type: ignore[arg-type]


def by_hand(problem: BlockProblem, x: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales after `steps` of SIGN's 4 steps in float64, straight from the equations of SignRound."""
    w = problem.weights["w"].double().numpy()
    start = problem.start["w"]
    first = start.codes.numpy().astype(int) - 4
    scales = np.repeat(start.scales.double().numpy(), 4, axis=1)
    p = 0.7 * np.clip(w / scales - first, -0.5, 0.5)
    m = np.ones((3, 2))
    for step in range(steps):
        values = np.clip(first + np.round(p), -4, 3)
        decoded = values * scales * np.repeat(m, 4, axis=1)
        slope = 2 * ((x @ decoded.T - x @ w.T).T @ x)
        share = 2 / 4 * (1 - step / 4)
        p = np.clip(p - 0.8 * share * np.sign(slope * scales), -1, 1)
        m = m - 0.02 * share * np.sign((slope * decoded).reshape(3, 2, 4).sum(-1))
    return np.clip(first + np.round(p), -4, 3) + 4, start.scales.double().numpy() * m


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(10))
def test_steps_are_those_of_the_equations_worked_out_in_float64(seed: int, steps: int) -> None:
    problem, x = linear(seed)
    offsets = Offsets.of(problem.weights["w"], problem.start["w"], SIGN)
    for step in range(steps):
        [slope] = gradients(problem, {"w": offsets.weight()}, [0])
        offsets.step_(slope, step, 4)
    found = offsets.quantized()
    codes, scales = by_hand(problem, x, steps)
    assert np.array_equal(found.codes.numpy(), codes)
    np.testing.assert_allclose(found.scales.numpy(), scales, rtol=CLOSE)


@pytest.mark.parametrize(
    "name", ["int3-g16-f16", "nf4-g16-f16", "uint4-g16-offset-f16", "nvfp4", "fp8_e4m3-channel-f32"]
)
@pytest.mark.parametrize("lean", [0.0, 0.6, 1.0])
def test_the_first_weight_is_the_starts(name: str, lean: float) -> None:
    problem = toy(name)
    for site, start in problem.start.items():
        # Codes that no rounding to nearest would give.
        shifted = replace(start, codes=start.codes.roll(1, 0))
        offsets = Offsets.of(problem.weights[site], shifted, replace(SIGN, lean=lean))
        assert torch.equal(offsets.weight(), shifted.dequantize())
        assert torch.equal(offsets.quantized().codes, shifted.codes)


def test_no_steps_give_the_start() -> None:
    problem = toy()
    solution = SignedGradient(steps=0).refine(problem)
    assert solution.error == solution.error_before
    for site, start in problem.start.items():
        assert torch.equal(solution.weights[site].codes, start.codes)


def test_the_place_between_neighbours_is_counted_in_rungs_whatever_the_scales_sign() -> None:
    below, at, above = (torch.full((6,), value) for value in (-1.0, 1.0, 2.0))
    w = torch.tensor([1.0, 1.5, 2.0, 0.0, -1.0, 5.0])
    expected = [0.0, 0.5, 1.0, -0.5, -1.0, 4.0]
    assert between(w, below, at, above).tolist() == expected
    assert between(-w, -below, -at, -above).tolist() == expected
    # Ends of the ladder, and a scale of zero.
    assert between(w, at, at, above)[:4].tolist() == [0.0, 0.5, 1.0, -1.0]
    assert between(w, below, at, at)[:4].tolist() == [0.0, 0.25, 0.5, -0.5]
    assert between(w, at, at, at).tolist() == [0.0] * 6


def test_learned_scales_are_stored_ones() -> None:
    solution = SignedGradient(steps=12, batches=1).refine(toy("int2-g16-bf16"))
    for weight in solution.weights.values():
        assert weight.scales.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "changed", "fixed"),
    [
        ("uint4-g16-offset-f16", {"scales", "offsets"}, set()),
        ("uint4-g16-asym-f16", {"scales"}, {"zeros"}),
        ("nvfp4", {"parents"}, {"scales"}),
        ("uint4-g16-offset=uint6x2.f16-uint6x2.f16", {"parents", "offset_parents"}, {"scales", "offsets"}),
        ("mxfp4", set(), {"scales"}),
    ],
)
def test_the_floats_that_scales_and_offsets_go_back_to_are_learned(
    name: str, changed: set[str], fixed: set[str]
) -> None:
    problem = toy(name)
    start = problem.start["a"]
    offsets = Offsets.of(problem.weights["a"], start, SIGN)
    offsets.step_(torch.ones(start.shape), 0, 4)
    found = offsets.quantized()
    for field in changed:
        assert not torch.equal(getattr(found, field), getattr(start, field))
    for field in fixed:
        assert torch.equal(getattr(found, field), getattr(start, field))


@pytest.mark.parametrize(
    "name", ["uint4-g16-offset=uint6x2.f16-uint6x2.f16", "int3-g16-f32", "uint4-tensor-offset-f32"]
)
def test_multipliers_go_against_the_slope_of_the_error(name: str) -> None:
    problem = toy(name)
    start = problem.start["b"]
    offsets = Offsets.of(problem.weights["b"], start, replace(SIGN, scale_reach=0.001))
    weights = {site: weight.dequantize() for site, weight in problem.start.items()}
    slope = gradients(problem, weights, [0])[1]
    for multipliers in offsets.multipliers:
        before = multipliers.factors.clone()
        multipliers.step_(slope, start, start.dequantize(), step=0, rate=1e-3)
        for index in range(min(6, before.numel())):
            along = torch.zeros_like(before).flatten()
            along[index] = 1e-2
            change = replace(multipliers, factors=before + along.reshape(before.shape)).applied(start).dequantize()
            predicted = float((slope * (change - start.dequantize())).sum())
            step = float((multipliers.factors - before).flatten()[index])
            assert step == pytest.approx(-1e-3 * np.sign(predicted), rel=1e-3)


def test_moments_are_adams_with_a_second_moment_in_factors() -> None:
    generator = np.random.default_rng(0)
    given = generator.normal(size=(5, 4, 6)) * 1e-12
    moments = Moments.zero((4, 6), torch.device("cpu"))
    mean, rows, columns = np.zeros((4, 6)), np.zeros(4), np.zeros(6)
    for step, gradient in enumerate(given):
        found = moments.of(torch.tensor(gradient, dtype=torch.float32), step)
        mean = 0.9 * mean + 0.1 * gradient
        rows = 0.95 * rows + 0.05 * (gradient**2).mean(1)
        columns = 0.95 * columns + 0.05 * (gradient**2).mean(0)
        square = np.outer(rows, columns) / rows.mean() / (1 - 0.95 ** (step + 1))
        np.testing.assert_allclose(found.numpy(), mean / (1 - 0.9 ** (step + 1)) / np.sqrt(square), rtol=1e-4)


def test_what_has_no_gradient_does_not_move() -> None:
    moments = Moments.zero((2, 3), torch.device("cpu"))
    gradient = torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
    found = moments.of(gradient, 0)
    assert found[1].tolist() == [0.0] * 3
    assert found[0, 1] == 0
    assert moments.of(torch.zeros(2, 3), 1)[1].tolist() == [0.0] * 3
