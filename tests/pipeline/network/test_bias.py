"""Correction of biases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pennyweight.pipeline.network.bias import add_bias_, channel_axis, mean_shift, shifted


def outputs(module: nn.Module, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return [module(torch.randn(shape, generator=generator)) for _ in range(3)]


CASES = {
    "linear": (nn.Linear(4, 3), (5, 4)),
    "linear on tokens": (nn.Linear(4, 3), (5, 6, 4)),
    "conv": (nn.Conv2d(2, 3, 3), (5, 2, 6, 6)),
    "conv of one picture": (nn.Conv2d(2, 3, 3), (2, 6, 6)),
    "transposed": (nn.ConvTranspose1d(2, 3, 3), (5, 2, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_shift_of_each_channel_is_found_and_taken_back(case: str) -> None:
    module, shape = CASES[case]
    y, axis = outputs(module, *shape), channel_axis(module)
    away = torch.tensor([0.5, -1.0, 0.25])
    rounded = [shifted(one, -away, axis) for one in y]
    shift = mean_shift(y, rounded, axis)
    assert torch.allclose(shift, away.double(), atol=1e-6)
    for one, other in zip(y, rounded, strict=True):
        assert torch.allclose(shifted(other, shift, axis), one, atol=1e-5)


def test_a_shift_that_the_halves_of_the_samples_do_not_share_is_no_shift() -> None:
    y = [torch.zeros(40, 3)]
    rounded = [torch.ones(40, 3) * torch.tensor([1.0, -1.0]).repeat(20)[:, None]]
    assert not mean_shift(y, rounded, -1).any()


def test_the_shift_is_the_harmonic_mean_of_the_means_of_both_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    y = [torch.randn(7, 3, 4, generator=generator) for _ in range(3)]
    rounded = [one - 0.2 - torch.randn(one.shape, generator=generator) for one in y]
    away = torch.cat(y).double() - torch.cat(rounded).double()
    a, b = (away[half::2].mean((0, 2)) for half in range(2))
    shift = mean_shift(y, rounded, -2)
    assert torch.allclose(shift, torch.where(a * b > 0, 2 / (1 / a + 1 / b), 0.0))


@pytest.mark.parametrize("seed", range(20))
def test_the_error_of_both_halves_falls_in_every_channel_that_is_shifted(seed: int) -> None:
    away = torch.randn(20, 50, generator=torch.Generator().manual_seed(seed)).double()
    shift = mean_shift([away], [torch.zeros_like(away)], -1)
    assert shift.any()
    for half in range(2):
        change = (away[half::2] - shift).square().sum(0) - away[half::2].square().sum(0)
        assert bool((change[shift != 0] < 0).all())


def test_samples_alternate_across_batches_of_any_size() -> None:
    y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    rounded = y - 0.3 + 0.5 * torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    whole = mean_shift([y], [rounded], -1)
    parts = mean_shift(list(y.split(1)), list(rounded.split(1)), -1)
    assert torch.allclose(whole, parts)


def test_a_module_without_a_bias_gets_one() -> None:
    module = nn.Conv2d(2, 3, 3, bias=False)
    x = torch.randn(1, 2, 5, 5)
    with torch.no_grad():
        before = module(x)
        add_bias_(module, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        assert torch.allclose(
            module(x) - before, torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand(1, 3, 3, 3), atol=1e-6
        )
