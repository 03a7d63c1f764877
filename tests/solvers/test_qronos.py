"""Qronos against the paper's own loop, against GPTQ where the two are the same, and against what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.schemes import Parameters, Scheme, fit_scales, parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.factor import factor_of
from pennyweight.solvers.gptq import Gptq
from pennyweight.solvers.qronos import Qronos
from tests.solvers.problems import agreement, damped, loss_of_outputs, problem

BLOCK = 32
SCHEMES = ["int4-g32-f32", "int3-g32-f16", "int2-channel-bf16", "int4-channel-f32", "int8-tensor-f32"]
# One target in a few thousand lies so close to halfway that float32 and float64 round it apart, and what follows in its
# row with it.
ALMOST_ALL = 0.98
# Relative error of float32 targets, against float64.
FLOAT32 = 2e-4


def least_squares(w: Tensor, stats: Statistics, damping: float = 0.01) -> Tensor:
    """W (G + shift) (H + shift)⁻¹ in float64."""
    assert stats.cross is not None
    assert stats.hessian is not None
    h = damped(stats, damping)
    g = stats.cross.double() + h - stats.hessian.double()
    return torch.linalg.solve(h, w.double() @ g, left=False)


def textbook(
    w: Tensor, scheme: Scheme, stats: Statistics, parameters: Parameters, *, is_first_free: bool
) -> tuple[Tensor, Tensor]:
    """Codes by the paper's iteration in float64, and the codes of the first column it took.

    q_t minimises |W X̃ - (q_{<t} X_{<t} + q_t X_t + v_{>t} X_{>t})|² given the v that there are, and v_{>t} is then the
    least-squares solution given q_{<=t}. The paper starts from v = w; `is_first_free` starts from the solution.
    """
    assert stats.hessian is not None
    assert stats.cross is not None
    h = damped(stats)
    g = stats.cross.double() + h - stats.hessian.double()
    order = stats.hessian.diagonal().argsort(stable=True).flip(0)
    h, wg = h[order][:, order], (w.double() @ g)[:, order]
    v = least_squares(w, stats)[:, order] if is_first_free else w.double()[:, order].clone()
    low, high = scheme.element.smallest, scheme.element.largest
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for t, column in enumerate(order.tolist()):
        others = v.clone()
        others[:, t] = 0
        aim = (wg[:, t] - others @ h[:, t]) / h[t, t]
        scale = parameters.scales[:, column // scheme.group_size(w.shape[1])].double()
        value = (aim / scale).round().clamp(low, high)
        v[:, t] = (value * scale).to(parameters.scales.dtype).double()
        codes[:, column] = (value - low).to(torch.uint8)
        rest = slice(t + 1, None)
        v[:, rest] = torch.linalg.solve(h[rest, rest], wg[:, rest] - v[:, : t + 1] @ h[: t + 1, rest], left=False)
    return codes, codes[:, int(order[0])]


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_those_of_the_papers_iteration(name: str) -> None:
    w, stats = problem(40, 96)
    scheme = parse_scheme(name)
    parameters = fit_scales(least_squares(w, stats).float(), scheme, importance=stats.importance)
    found = Qronos(block=BLOCK, rounds=0, passes=0).solve(w, scheme, stats).weight.codes
    assert agreement(found, textbook(w, scheme, stats, parameters, is_first_free=True)[0]) > ALMOST_ALL
    # As the paper starts, its first column may be another; with the same first column all others are the same.
    codes, first = textbook(w, scheme, stats, parameters, is_first_free=False)
    assert stats.hessian is not None
    alike = found[:, int(stats.hessian.diagonal().argsort(stable=True)[-1])] == first
    assert alike.sum() > 10
    assert agreement(found[alike], codes[alike]) > ALMOST_ALL


def test_without_the_correction_the_codes_are_others() -> None:
    w, stats = problem(40, 96)
    scheme = parse_scheme("int4-g32-f32")
    plain = Gptq().solve(w, scheme, stats).weight.codes
    assert agreement(Qronos(rounds=0, passes=0).solve(w, scheme, stats).weight.codes, plain) < 0.9


@pytest.mark.parametrize("name", [*SCHEMES, "nf4-g32-f32", "uint4-g32-offset-f16"])
def test_inputs_that_are_still_those_of_the_original_model_give_gptq(name: str) -> None:
    w, stats = problem(20, 96)
    scheme = parse_scheme(name)
    same = Statistics(stats.hessian, stats.hessian)
    expected = Gptq(rounds=2, passes=2).solve(w, scheme, stats).weight.codes
    assert torch.equal(Qronos(rounds=2, passes=2).solve(w, scheme, same).weight.codes, expected)
    uncorrected = Qronos(correction=0, rounds=2, passes=2).solve(w, scheme, stats).weight.codes
    assert torch.equal(uncorrected, expected)


@pytest.mark.parametrize("correction", [1.0, 0.5])
@pytest.mark.parametrize("block", [7, 32, 200])
def test_targets_are_the_least_squares_weight_or_on_the_way_to_it(correction: float, block: int) -> None:
    w, stats = problem(12, 96)
    factor = factor_of(stats, damping=0.01, block=block)
    found = Qronos(correction=correction)._targets(w, stats, factor).double()
    expected = w.double() + correction * (least_squares(w, stats) - w.double())
    assert (found - expected).abs().max() < FLOAT32 * expected.abs().max()


def test_a_known_change_of_the_input_is_undone() -> None:
    w, stats = problem(16, 48)
    assert stats.hessian is not None
    # x = A x̃, so G = A⁻¹ H and W* = W A⁻¹.
    change = torch.eye(48) + 0.3 * torch.randn(48, 48) / 48**0.5
    moved = Statistics(stats.hessian, torch.linalg.solve(change, stats.hessian))
    weight = Qronos(damping=1e-6).solve(w, parse_scheme("int8-channel-f32"), moved).weight
    expected = torch.linalg.solve(change, w, left=False)
    assert loss_of_outputs(w, weight, moved) < 1e-3 * float(((w - expected) @ stats.hessian * (w - expected)).sum())


@pytest.mark.parametrize("name", ["int4-g32-f32", "int2-channel-bf16"])
def test_outputs_are_nearer_to_those_of_the_original_than_with_gptq(name: str) -> None:
    shares = []
    for seed in range(10):
        w, stats = problem(8, 64, seed=seed)
        ours, theirs = (
            loss_of_outputs(w, each.solve(w, parse_scheme(name), stats).weight, stats)
            for each in (Qronos(), Gptq(rounds=2, passes=2))
        )
        shares.append(ours / theirs)
    assert sum(shares) / len(shares) < 0.95


def test_a_cross_moment_that_is_missing_or_ill_shaped_is_refused() -> None:
    w, stats = problem(4, 32)
    for cross in (None, torch.eye(31)):
        with pytest.raises(ShapeError, match=r"qronos needs a cross moment of shape \(32, 32\).*calibrate"):
            Qronos().solve(w, parse_scheme("int4-g32-f16"), Statistics(stats.hessian, cross))


def test_raised_damping_and_falling_back_are_noted() -> None:
    w, stats = problem(8, 32)
    assert stats.hessian is not None
    values, vectors = torch.linalg.eigh(stats.hessian.double())
    values[0] = -0.05 * values.mean()
    indefinite = (vectors * values @ vectors.T).float()
    scheme = parse_scheme("int4-g16-f32")
    assert Qronos().solve(w, scheme, Statistics(indefinite, indefinite)).notes == ("damping raised from 0.01 to 0.1",)
    (note,) = Qronos().solve(w, scheme, Statistics(-1e3 * stats.hessian, stats.cross)).notes
    assert note.startswith("fell back to nearest")
