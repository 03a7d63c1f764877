"""Moments of what a site reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.pipeline.network.moments import Collector

# Sums of a few hundred products in float32 against float64.
CLOSE = 2e-5


def data(groups: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(groups, 200, 5, generator=generator) + torch.arange(5.0)
    return x, x + 0.1 * torch.randn(x.shape, generator=generator)


@pytest.mark.parametrize("has_cross", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 130])
def test_moments_are_means_of_products(groups: int, has_cross: bool) -> None:
    x, original = data(groups)
    collector = Collector(groups, 5, has_cross=has_cross)
    for one, other in zip(x.split(70, 1), original.split(70, 1), strict=True):
        collector.add(one, other)
    found = collector.finished()
    a, b = x.double(), original.double()
    assert found.rows == 200
    assert (found.hessian - a.transpose(1, 2) @ a / 200).abs().max() < CLOSE
    assert (found.cross is not None) == has_cross
    if found.cross is not None:
        assert (found.cross - b.transpose(1, 2) @ a / 200).abs().max() < CLOSE
        assert torch.equal(found.of_group(groups - 1).cross, found.cross[groups - 1])


def test_no_rows_give_no_moments() -> None:
    assert not Collector(2, 3, has_cross=True).finished().hessian.any()
