"""Rounding of many small groups at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from pennyweight.pipeline.network.grouped import (
    GroupedRounding,
    _factors,
    _feedback,
    _Grid,
    _problem,
    _scaled,
)
from pennyweight.pipeline.network.moments import Moments
from pennyweight.schemes import QuantizedWeight, Scheme, fit_scales, parse_scheme

SCHEMES = (
    "int2-channel",
    "int3-channel",
    "int4-channel",
    "int8-channel",
    "uint4-channel-asym",
    "int4-g3",
    "int4-tensor",
)


def scheme_of(name: str) -> Scheme:
    return parse_scheme(name).with_scale_dtype(torch.float32)


def made(groups: int = 7, rows: int = 2, inputs: int = 6, *, seed: int = 0) -> tuple[Tensor, Moments]:
    """A weight [groups * rows, inputs] and the moments of correlated inputs with a mean, a dead column among them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, inputs, inputs, generator=generator)
    x = torch.randn(groups, 300, inputs, generator=generator) @ mix + 1
    x[0, :, inputs // 2] = 0
    other = x + 0.2 * torch.randn(x.shape, generator=generator) * (x != 0)
    weight = torch.randn(groups * rows, inputs, generator=generator)
    return weight, Moments(x.transpose(1, 2) @ x / 300, other.transpose(1, 2) @ x / 300, 300)


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    diagonal = hessian.diagonal()
    raised = torch.where(diagonal > 0, diagonal + damping * diagonal.mean(), 1.0)
    return (hessian - diagonal.diag() + raised.diag()).double()


def errors_of(w: Tensor, weight: QuantizedWeight, moments: Moments) -> Tensor:
    """tr(E H Eᵀ) of each row, H damped; float64 [rows]."""
    groups = moments.hessian.shape[0]
    e = (w - weight.dequantize()).double().view(groups, -1, w.shape[1])
    h = torch.stack([damped(one) for one in moments.hessian])
    return ((e @ h) * e).sum(2).flatten()


def by_the_book(targets: Tensor, hessian: Tensor, weight: QuantizedWeight) -> Tensor:
    """Values of one group, float64 [rows, in]: column after column by falling importance, each rounded from where it is
    best given those before it and all others free: Ŵ_F = T_F + E_S H_SF H_FF⁻¹."""
    h = damped(hessian)
    values, errors = torch.zeros(targets.shape, dtype=torch.float64), torch.zeros(targets.shape, dtype=torch.float64)
    scales = weight.parameters.decoded(weight.scheme).scales.double()
    fixed: list[int] = []
    order = hessian.diagonal().argsort(stable=True).tolist()[::-1]
    for column in order:
        free = [j for j in range(len(order)) if j not in fixed]
        aims = targets.double()[:, free]
        if fixed:
            aims = aims + errors[:, fixed] @ h[fixed][:, free] @ torch.linalg.inv(h[free][:, free])
        aim = aims[:, free.index(column)]
        value = weight.scheme.element.nearest((aim / scales[:, 0]).float()).double()
        values[:, column], errors[:, column] = value, targets.double()[:, column] - value * scales[:, 0]
        fixed.append(column)
    return values


@pytest.mark.parametrize("name", ["int2-channel", "int3-channel", "int4-channel", "int8-channel"])
def test_feedback_is_that_of_the_book_in_every_group(name: str) -> None:
    w, moments = made()
    plain = replace(moments, cross=None)
    weight = GroupedRounding(passes=0).solve(w, scheme_of(name), plain)
    for group in range(7):
        rows = slice(2 * group, 2 * group + 2)
        wanted = by_the_book(w[rows], moments.hessian[group], weight.rows(rows))
        found = weight.scheme.element.decode(weight.codes[rows]).double()
        assert torch.equal(found, wanted), group


@pytest.mark.parametrize("name", SCHEMES)
def test_no_column_can_be_better_alone(name: str) -> None:
    w, moments = made()
    weight = GroupedRounding(passes=20).solve(w, scheme_of(name), replace(moments, cross=None))
    least = errors_of(w, weight, moments)
    for column, step in product(range(w.shape[1]), (-1, 1)):
        codes = weight.codes.clone().to(torch.int16)
        codes[:, column] += step
        allowed = (codes[:, column] >= 0) & (codes[:, column] < 2**weight.scheme.element.bits)
        moved = replace(weight, codes=codes.clamp(0, 2**weight.scheme.element.bits - 1).to(torch.uint8))
        worse = errors_of(w, moved, moments) >= least - 1e-5 * least.max()
        assert bool((worse | ~allowed).all())


@pytest.mark.parametrize("name", SCHEMES)
def test_groups_do_not_know_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, moments = made()
    whole = GroupedRounding().solve(w, scheme_of(name), moments)
    monkeypatch.setattr("pennyweight.pipeline.network.grouped._CHUNK", 1)
    alone = GroupedRounding().solve(w, scheme_of(name), moments)
    assert torch.equal(whole.codes, alone.codes)
    assert torch.equal(whole.scales, alone.scales)


def test_each_row_has_the_scale_that_leaves_least_of_it() -> None:
    w, moments = made()
    scheme = scheme_of("int3-channel")
    rounding = GroupedRounding(passes=0)
    best = errors_of(w, rounding.solve(w, scheme, replace(moments, cross=None)), moments)
    problem = _problem(w.view(7, 2, 6), replace(moments, cross=None), rounding)
    fitted = fit_scales(w, scheme)
    for factor in _factors(scheme):
        grid = _Grid.of(_scaled(fitted, torch.tensor(factor), scheme), scheme, problem)
        left = _feedback(problem, grid)[1].flatten().double()
        assert bool((best <= left * (1 + 1e-4)).all())


def test_what_feedback_leaves_is_the_error_under_the_hessian() -> None:
    w, moments = made()
    scheme = scheme_of("int4-channel")
    problem = _problem(w.view(7, 2, 6), replace(moments, cross=None), GroupedRounding())
    parameters = fit_scales(w, scheme)
    values, left = _feedback(problem, _Grid.of(parameters, scheme, problem))
    back = torch.empty_like(values).scatter_(2, problem.order[:, None].expand_as(values), values)
    weight = QuantizedWeight.of(scheme.element.encode(back).view(14, 6), parameters, scheme)
    assert torch.allclose(left.flatten().double(), errors_of(w, weight, moments), rtol=1e-3)


def test_targets_undo_what_rounding_before_did_to_the_inputs() -> None:
    w, moments = made()
    # The inputs are those of the original times 2: half the weight gives the same.
    assert moments.hessian is not None
    doubled = Moments(4 * moments.hessian[1:], 2 * moments.hessian[1:], 300)
    problem = _problem(w[2:].view(6, 2, 6), doubled, GroupedRounding(damping=1e-6, correction=1.0))
    assert torch.allclose(problem.targets, w[2:].view(6, 2, 6) / 2, atol=1e-3)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("kind", ["zeros", "one column", "dead", "outliers"])
def test_hostile_groups_are_rounded_too(name: str, kind: str) -> None:
    if kind == "one column" and name == "int4-g3":
        pytest.skip("groups of 3 do not divide 1")
    w, moments = made(inputs=1) if kind == "one column" else made()
    if kind == "zeros":
        w = torch.zeros_like(w)
    if kind == "dead":
        moments = Moments(torch.zeros_like(moments.hessian), torch.zeros_like(moments.hessian), 300)
    if kind == "outliers":
        w = torch.distributions.Cauchy(0.0, 1.0).sample(w.shape)
    weight = GroupedRounding().solve(w, scheme_of(name), moments)
    assert weight.shape == w.shape
    assert bool(weight.dequantize().isfinite().all())
    if kind == "zeros":
        assert not weight.dequantize().any()
