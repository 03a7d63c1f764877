"""Correction of biases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pennyweight.models.network import capture
from pennyweight.pipeline.network.bias import add_bias_, channel_axis, function_behind, output_shift, shifted


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
    shift = output_shift(y, rounded, axis)
    assert torch.allclose(shift, away.double(), atol=1e-6)
    for one, other in zip(y, rounded, strict=True):
        assert torch.allclose(shifted(other, shift, axis), one, atol=1e-5)


def test_a_shift_that_the_halves_of_the_samples_do_not_share_is_no_shift() -> None:
    y = [torch.zeros(40, 3)]
    rounded = [torch.ones(40, 3) * torch.tensor([1.0, -1.0]).repeat(20)[:, None]]
    assert not output_shift(y, rounded, -1).any()


def test_the_shift_is_the_harmonic_mean_of_the_means_of_both_halves() -> None:
    generator = torch.Generator().manual_seed(0)
    y = [torch.randn(7, 3, 4, generator=generator) for _ in range(3)]
    rounded = [one - 0.2 - torch.randn(one.shape, generator=generator) for one in y]
    away = torch.cat(y).double() - torch.cat(rounded).double()
    a, b = (away[half::2].mean((0, 2)) for half in range(2))
    shift = output_shift(y, rounded, -2)
    assert torch.allclose(shift, torch.where(a * b > 0, 2 / (1 / a + 1 / b), 0.0))


@pytest.mark.parametrize("seed", range(20))
def test_the_error_of_both_halves_falls_in_every_channel_that_is_shifted(seed: int) -> None:
    away = torch.randn(20, 50, generator=torch.Generator().manual_seed(seed)).double()
    shift = output_shift([away], [torch.zeros_like(away)], -1)
    assert shift.any()
    for half in range(2):
        change = (away[half::2] - shift).square().sum(0) - away[half::2].square().sum(0)
        assert bool((change[shift != 0] < 0).all())


def test_numbers_that_a_function_cuts_off_say_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.rand(200, 1, generator=generator) + 1, torch.full((200, 1), -50.0)])[torch.randperm(400)]
    # What lies far below 0 is 10 lower, what a ReLU lets pass 0.1.
    rounded = torch.where(y > 0, y - 0.1, y - 10)
    assert output_shift([y], [rounded], -1).item() > 4
    assert output_shift([y], [rounded], -1, torch.relu).item() == pytest.approx(0.1, abs=1e-5)
    capped = output_shift([6 - y], [6 - rounded], -1, torch.nn.functional.relu6)
    assert capped.item() == pytest.approx(-0.1, abs=1e-5)


@pytest.mark.parametrize("behind", [torch.relu, torch.nn.functional.gelu, torch.nn.functional.hardswish, torch.sigmoid])
def test_the_error_behind_a_function_falls_nearly_to_the_least(behind: Callable[[Tensor], Tensor]) -> None:
    y = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)) - 0.5
    rounded = y - 0.2

    def error(shift: float) -> float:
        return float((behind(y) - behind(rounded + shift)).square().mean())

    assert error(output_shift([y], [rounded], -1, behind).item()) < 0.1 * error(0.0)


class Followed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.clamp(torch.nn.functional.silu(self.one(x)), -0.1, 0.5)
        y = self.two(x)
        return self.three(torch.relu(y) + y)


def test_the_function_behind_a_site_is_found() -> None:
    network = capture(Followed(), torch.randn(3, 4))
    nodes = {node.name: node for node in network.graph.graph.nodes}
    of = {site.name: function_behind(nodes[site.nodes[0]]) for site in network.sites}
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(of["one"](x), torch.nn.functional.silu(x).clamp(-0.1, 0.5))
    # Two read what the second gives, and nobody follows the third.
    assert torch.equal(of["two"](x), x)
    assert torch.equal(of["three"](x), x)


def test_samples_alternate_across_batches_of_any_size() -> None:
    y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    rounded = y - 0.3 + 0.5 * torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    whole = output_shift([y], [rounded], -1)
    parts = output_shift(list(y.split(1)), list(rounded.split(1)), -1)
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
