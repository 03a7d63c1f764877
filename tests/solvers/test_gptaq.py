"""GPTAQ against the paper's loop, against GPTQ where the two are the same, and against what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.schemes import Parameters, Scheme, fit_scales, parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.factor import factor_of
from pennyweight.solvers.gptaq import Gptaq
from pennyweight.solvers.gptq import Gptq
from tests.solvers.problems import agreement, damped, loss_of_outputs, problem

BLOCK = 32
SCHEMES = ["int4-g32-f32", "int3-g32-f16", "int2-channel-bf16", "int8-tensor-f32"]
# One target in a few thousand lies so close to halfway that float32 and float64 round it apart, and what follows in its
# row with it.
ALMOST_ALL = 0.98


def textbook(w: Tensor, scheme: Scheme, stats: Statistics, parameters: Parameters, alpha: float) -> Tensor:
    """Codes by the paper's loop in float64: U the upper Cholesky factor of the inverse Hessian,

    P = alpha triu(Δ Uᵀ, 1) U,  e = (v_i - q_i) / U_ii,  v_j += w_i P_ij - e U_ij for every j > i
    """
    assert stats.hessian is not None
    assert stats.cross is not None
    order = stats.hessian.diagonal().argsort(stable=True).flip(0)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(stats)[order][:, order]), upper=True)
    drift = (stats.cross.double() - stats.hessian.double())[order][:, order]
    passed_on = alpha * (drift @ upper.T).triu(1) @ upper
    w = w.double()[:, order]
    v = w.clone()
    low, high = scheme.element.smallest, scheme.element.largest
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for i, column in enumerate(order.tolist()):
        scale = parameters.scales[:, column // scheme.group_size(w.shape[1])].double()
        value = (v[:, i] / scale).round().clamp(low, high)
        error = (v[:, i] - (value * scale).to(parameters.scales.dtype).double()) / upper[i, i]
        v[:, i + 1 :] += w[:, i, None] * passed_on[i, i + 1 :] - error[:, None] * upper[i, i + 1 :]
        codes[:, column] = (value - low).to(torch.uint8)
    return codes


def targets(w: Tensor, stats: Statistics, alpha: float, block: int = BLOCK) -> Tensor:
    return Gptaq(alpha=alpha, block=block)._targets(w, stats, factor_of(stats, damping=0.01, block=block))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_codes_are_those_of_the_papers_loop(name: str, alpha: float) -> None:
    w, stats = problem(40, 160)
    scheme = parse_scheme(name)
    parameters = fit_scales(targets(w, stats, alpha), scheme, importance=stats.importance)
    found = Gptaq(alpha=alpha, block=BLOCK).solve(w, scheme, stats).weight.codes
    assert agreement(found, textbook(w, scheme, stats, parameters, alpha)) > ALMOST_ALL
    assert agreement(found, textbook(w, scheme, stats, parameters, 0)) < 0.97


@pytest.mark.parametrize("block", [1, 7, 200])
def test_block_size_changes_speed_only(block: int) -> None:
    w, stats = problem(12, 96)
    torch.testing.assert_close(targets(w, stats, 0.5, block), targets(w, stats, 0.5), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_inputs_that_are_still_those_of_the_original_model_give_gptq(name: str) -> None:
    w, stats = problem(20, 96)
    scheme = parse_scheme(name)
    expected = Gptq().solve(w, scheme, stats).weight.codes
    assert torch.equal(Gptaq().solve(w, scheme, Statistics(stats.hessian, stats.hessian)).weight.codes, expected)
    assert torch.equal(Gptaq(alpha=0).solve(w, scheme, stats).weight.codes, expected)


def test_outputs_are_nearer_to_those_of_the_original_than_with_gptq() -> None:
    shares = []
    for seed in range(10):
        w, stats = problem(8, 64, seed=seed)
        ours, theirs = (
            loss_of_outputs(w, each.solve(w, parse_scheme("int4-g32-f32"), stats).weight, stats)
            for each in (Gptaq(alpha=1.0), Gptq())
        )
        shares.append(ours / theirs)
    assert sum(shares) / len(shares) < 0.95


def test_a_cross_moment_that_is_missing_is_refused() -> None:
    w, stats = problem(4, 32)
    with pytest.raises(ShapeError, match=r"gptaq needs a cross moment of shape \(32, 32\).*calibrate"):
        Gptaq().solve(w, parse_scheme("int4-g32-f16"), Statistics(stats.hessian))
