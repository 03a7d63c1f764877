"""Moments of what a site reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.pipeline.network.moments import Collector, Moments

# Sums of a few hundred products in float32 against float64.
CLOSE = 2e-5


def collected(x: Tensor, original: Tensor, *, is_centred: bool, parts: int = 4) -> Moments:
    collector = Collector(x.shape[0], x.shape[2], has_cross=True, is_centred=is_centred)
    for one, other in zip(x.chunk(parts, 1), original.chunk(parts, 1), strict=True):
        collector.add(one, other)
    return collector.finished()


def data(groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(groups, 200, 5, generator=generator) + torch.arange(5.0)
    return x, x + 0.1 * torch.randn(x.shape, generator=generator)


@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 130])
def test_moments_are_means_of_products(groups: int, is_centred: bool) -> None:
    x, original = data(groups)
    found = collected(x, original, is_centred=is_centred)
    a, b = x.double(), original.double()
    if is_centred:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    assert found.rows == 200
    assert found.cross is not None
    assert (found.hessian - a.transpose(1, 2) @ a / 200).abs().max() < CLOSE
    assert (found.cross - b.transpose(1, 2) @ a / 200).abs().max() < CLOSE


def test_a_large_mean_takes_no_digits_from_moments_about_it() -> None:
    x, original = data(2)
    near, far = (collected(x + shift, original + shift, is_centred=True) for shift in (0.0, 1000.0))
    # The numbers themselves lose three digits.
    assert (near.hessian - far.hessian).abs().max() < 1e-3


def test_a_constant_input_has_no_moment_about_its_mean() -> None:
    x = torch.full((1, 50, 3), 6.0)
    assert not collected(x, x, is_centred=True).hessian.any()
