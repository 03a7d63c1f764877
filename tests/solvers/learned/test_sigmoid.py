from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pennyweight.solvers.learned.sigmoid import Relaxed, Sigmoid
from tests.solvers.learned.blocks import toy

PLAIN = Sigmoid(rule="sign", steps=10, reach=3.0, scale_reach=0.0, strength=0.5, free=0.2)
CLOSE = 1e-5


@pytest.mark.parametrize(
    "name", ["int3-g16-f16", "nf4-g16-f16", "uint4-g16-offset-f16", "nvfp4", "fp8_e4m3-channel-f32"]
)
def test_the_first_weight_is_the_starts(name: str) -> None:
    problem = toy(name)
    for site, start in problem.start.items():
        shifted = replace(start, codes=start.codes.roll(1, 0))
        relaxed = Relaxed.of(problem.weights[site], shifted, PLAIN)
        assert torch.equal(relaxed.weight(), shifted.dequantize())
        assert torch.equal(relaxed.quantized().codes, shifted.codes)


@pytest.mark.parametrize("name", ["int3-g16-f16", "nf4-g16-f16", "fp4_e2m1-g16-f16", "uint4-g16-asym-f16"])
def test_the_other_code_is_the_neighbour_on_the_original_weights_side(name: str) -> None:
    problem = toy(name)
    w, start = problem.weights["a"], problem.start["a"]
    relaxed = Relaxed.of(w, start, PLAIN)
    first, other = start.dequantize(), relaxed.other.dequantize()
    is_inside = (w > first.amin()) & (w < first.amax()) & (other != first) & (w != first)
    assert bool(is_inside.any())
    assert torch.equal((w - first).sign()[is_inside], (other - first).sign()[is_inside])
    # To nearest: the weight lies no nearer to the other than to the start.
    assert bool(((w - first).abs() <= (w - other).abs() * 1.001 + 1e-4)[is_inside].all())


def test_steps_are_those_of_the_equations_worked_out_in_float64() -> None:
    problem = toy("int3-g16-f32")
    w, start = problem.weights["b"], problem.start["b"]
    relaxed = Relaxed.of(w, start, PLAIN)
    first, other = start.dequantize().double().numpy(), relaxed.other.dequantize().double().numpy()
    v = np.full(first.shape, -2.4)
    generator = np.random.default_rng(0)
    for step in range(10):
        gradient = generator.normal(size=first.shape)
        relaxed.step_(torch.tensor(gradient, dtype=torch.float32), step, 10)
        h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
        v = v - 2 * 3.0 / 10 * (1 - step / 10) * np.sign(gradient * (other - first))
        if step >= 2:
            beta = 20 - 18 * (step / 10 - 0.2) / 0.8
            v = v + 0.5 / 10 * np.sign(2 * h - 1) * np.abs(2 * h - 1) ** (beta - 1)
        v = np.clip(v, -2.4, 2.4)
        h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
        np.testing.assert_allclose(relaxed.logits.numpy(), v, atol=CLOSE)
        np.testing.assert_allclose(relaxed.weight().numpy(), first + h * (other - first), atol=CLOSE)
    assert torch.equal(relaxed.quantized().dequantize().double(), torch.tensor(np.where(v > 0, other, first)))


def test_what_is_not_moved_ends_where_it_is_stored() -> None:
    problem = toy()
    relaxed = Relaxed.of(problem.weights["a"], problem.start["a"], replace(PLAIN, strength=112.0))
    # Near 1/2 the regulariser leaves the choice open for long.
    places = torch.linspace(-1.9, 1.9, relaxed.logits.numel()).reshape(relaxed.start.shape)
    relaxed.logits.copy_(places + 0.5 * places.sign())
    stored = relaxed.quantized().dequantize()
    for step in range(100):
        relaxed.step_(torch.zeros(relaxed.start.shape), step, 100)
    assert torch.equal(relaxed.quantized().dequantize(), stored)
    np.testing.assert_allclose(relaxed.weight().numpy(), stored.numpy(), atol=CLOSE)


def test_no_steps_give_the_start() -> None:
    problem = toy()
    solution = Sigmoid(steps=0).refine(problem)
    for site, start in problem.start.items():
        assert torch.equal(solution.weights[site].codes, start.codes)
