"""Gradients of rounding, against the papers' formulas and against autograd of what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.formats import NumberFormat, number_format
from pennyweight.formats.integer import Int
from pennyweight.train.qat.lsq import (
    FREE,
    Grid,
    gradient_factor,
    passed_through,
    rounded,
    sized,
    weight_gradient_factor,
)

# Sums of a few float64 numbers in another order.
CLOSE = 1e-12


def explicit(x: Tensor, scale: Tensor, offset: Tensor | None, element: NumberFormat) -> Tensor:
    """LSQ and LSQ+ as their authors write them, with detach() where they pass gradients straight through."""
    beta = torch.zeros_like(scale) if offset is None else _whole_steps(offset, scale, element)
    v = (x - beta) / scale
    clipped = v.clamp(element.smallest, element.largest)
    return scale * (clipped + (element.nearest(clipped) - clipped).detach()) + beta


def _whole_steps(offset: Tensor, scale: Tensor, element: NumberFormat) -> Tensor:
    whole = -scale * (-offset / scale).round().clamp(element.smallest, element.largest)
    return offset + (whole - offset).detach()


def tensors(shape: tuple[int, ...], shared: tuple[int, ...], *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random, dtype=torch.float64) * 2
    scale = torch.rand(shared, generator=random, dtype=torch.float64) * 0.3 + 0.05
    offset = torch.randn(shared, generator=random, dtype=torch.float64)
    return x.requires_grad_(), scale.requires_grad_(), offset.requires_grad_()


def gradients(made: Tensor, *wanted: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 2, made.numel(), dtype=made.dtype).reshape(made.shape)
    return list(torch.autograd.grad((made * weights).sum(), wanted))


@pytest.mark.parametrize("shared", [(), (4, 1, 1), (4, 3, 1)])
@pytest.mark.parametrize("name", ["int2", "int4", "int8", "uint3", "nf4", "bal2", "fp4_e2m1"])
def test_without_a_zero_point_value_and_gradients_are_those_of_lsq(name: str, shared: tuple[int, ...]) -> None:
    x, scale, _ = tensors((4, 3, 7), shared)
    grid = Grid(number_format(name))
    made, wanted = rounded(x, scale, None, None, grid), explicit(x, scale, None, grid.element)
    torch.testing.assert_close(made, wanted, rtol=CLOSE, atol=CLOSE)
    for mine, theirs in zip(gradients(made, x, scale), gradients(wanted, x, scale), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("shared", [(), (4, 1, 1)])
@pytest.mark.parametrize("element", [Int(8, signed=False), Int(4, signed=False), Int(4), Int(2, signed=False)])
def test_with_an_offset_value_and_gradients_are_those_of_lsq_plus(element: Int, shared: tuple[int, ...]) -> None:
    x, scale, offset = tensors((4, 3, 7), shared)
    made, wanted = rounded(x, scale, offset, None, Grid(element)), explicit(x, scale, offset, element)
    torch.testing.assert_close(made, wanted, rtol=CLOSE, atol=CLOSE)
    inputs = (x, scale, offset)
    for mine, theirs in zip(gradients(made, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=CLOSE, atol=1e-10)


def test_the_step_s_gradient_has_lsq_s_closed_form() -> None:
    """Equation 3: -v + round(v) inside, the ends of the range outside."""
    x = torch.tensor([-9.0, -1.3, -0.4, 0.0, 0.2, 0.6, 1.4, 9.0], dtype=torch.float64)
    for place, wanted in enumerate([-2.0, -1 + 1.3, 0.4, 0.0, -0.2, 0.4, 1.0, 1.0]):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        rounded(x[place], scale, None, None, Grid(Int(2))).backward()
        assert scale.grad is not None
        assert float(scale.grad) == pytest.approx(wanted, abs=CLOSE)


@pytest.mark.parametrize("far", [-50.0, 50.0])
def test_outside_of_the_range_the_step_s_gradient_is_the_slope(far: float) -> None:
    """Where nothing is rounded there is a derivative: x̂ = s n or s p."""
    x, grid, size = torch.full((5,), far, dtype=torch.float64), Grid(Int(4)), 1e-6
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    rounded(x, scale, None, None, grid).sum().backward()
    up, down = (rounded(x, scale.detach() + step, None, None, grid).sum() for step in (size, -size))
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float(up - down) / (2 * size), rel=1e-6)


def test_outside_of_the_range_with_a_zero_point_that_stays_the_step_s_gradient_is_the_slope() -> None:
    """x̂ = s (p - z)."""
    x, grid = torch.full((3,), 1e3, dtype=torch.float64), Grid(Int(8, signed=False), zero=128)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    rounded(x, scale, None, None, grid).sum().backward()
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(3 * 127, abs=CLOSE)


def test_fixed_values_stay_and_have_no_gradient_but_their_steps_have() -> None:
    x, scale, _ = tensors((2, 3), (2, 1))
    fixed = torch.tensor([[3, FREE, -8], [FREE, 0, FREE]], dtype=torch.int16)
    made = rounded(x, scale, None, fixed, Grid(Int(4)))
    is_fixed = fixed != FREE
    wanted = torch.where(is_fixed, fixed * scale, explicit(x, scale, None, Int(4)))
    torch.testing.assert_close(made, wanted)
    found = gradients(made, x, scale)
    for mine, theirs in zip(found, gradients(wanted, x, scale), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=CLOSE, atol=CLOSE)
    assert not found[0][is_fixed].any()


def test_scales_are_rounded_to_their_stored_type_and_gradients_pass_it() -> None:
    scale = torch.tensor(0.1, requires_grad=True)
    grid = Grid(Int(4), stored=torch.float16)
    made = rounded(torch.tensor([0.3, 5.0]), scale, None, None, grid)
    stored = float(scale.detach().half())
    assert made.tolist() == [pytest.approx(3 * stored), pytest.approx(7 * stored)]
    made[1].backward()
    assert scale.grad is not None
    assert float(scale.grad) == 7


def test_numbers_are_computed_in_the_type_of_the_reader() -> None:
    grid = Grid(Int(8), stored=torch.float16, arithmetic=torch.float16)
    scale = torch.tensor(0.0999755859375)
    made = rounded(torch.tensor([12.0]), scale, None, None, grid)
    assert made.tolist() == [float(torch.tensor(120.0).half() * scale.half())]


def test_a_step_is_held_above_its_least_but_its_gradient_passes() -> None:
    step, unit = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True), torch.tensor([0.1, 0.2, -4.0])
    made = sized(step, unit, least=0.25, factor=0.5)
    assert made.tolist() == pytest.approx([0.025, 0.1, -8.0])
    made.sum().backward()
    assert step.grad is not None
    assert step.grad.tolist() == pytest.approx([5.0, 2.5, -0.125])


def test_a_step_of_sgd_moves_a_scale_as_lsq_does_whatever_its_unit() -> None:
    """s <- s - r g ds, the same for a step in units of 1 and of its own size."""
    x, grid = torch.randn(40, generator=torch.Generator().manual_seed(0)), Grid(Int(4))
    ends = []
    for unit in (1.0, 0.3):
        step = torch.tensor(0.3 / unit, requires_grad=True)
        for _ in range(3):
            scale = sized(step, torch.tensor(unit), least=0.0, factor=0.05)
            [slope] = torch.autograd.grad((rounded(x, scale, None, None, grid) - x).square().sum(), step)
            step = (step.detach() - 0.1 * slope).requires_grad_()
        ends.append(float(step.detach()) * unit)
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    assert ends[0] != pytest.approx(0.3, rel=1e-3)


def test_the_factor_of_the_gradient_is_lsq_s() -> None:
    assert gradient_factor(900, Int(4)) == pytest.approx(1 / (900 * 7) ** 0.5)
    assert gradient_factor(64, Int(8, signed=False)) == pytest.approx(1 / (64 * 255) ** 0.5)


def test_steps_of_weights_move_less_the_finer_they_are() -> None:
    assert weight_gradient_factor(144, Int(8)) == pytest.approx(1 / (12 * 127))
    assert weight_gradient_factor(144, Int(4)) == pytest.approx(1 / (12 * 7))
    assert weight_gradient_factor(144, Int(2)) == gradient_factor(144, Int(2))


def test_what_is_passed_through_keeps_the_gradient() -> None:
    x = torch.randn(4, requires_grad=True)
    made = passed_through(x, x.detach().round())
    assert torch.equal(made, x.detach().round())
    (made * torch.arange(4)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 2, 3]


def test_a_tiny_scale_never_becomes_zero() -> None:
    for stored in (torch.float32, torch.float16):
        scale = Grid(Int(4), stored=stored).scale(torch.tensor([0.0, -1e-45, 1e-30]))
        assert (scale != 0).all()
        assert torch.equal(scale.to(stored).float(), scale)
