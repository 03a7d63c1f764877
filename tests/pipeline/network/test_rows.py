"""The rows that a site reads: its output is what its matrix makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pennyweight.models.network.network import NetworkSite
from pennyweight.pipeline.network.rows import Reader

# Sums of a few dozen products of float32 numbers near 1.
CLOSE = 1e-4

CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "1d, stride 2, dilation 2": (nn.Conv1d(4, 6, 3, stride=2, dilation=2), (2, 4, 11)),
    "2d": (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 6, 7)),
    "2d, uneven": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 3, 7, 8)),
    "2d, groups": (nn.Conv2d(6, 9, 3, padding=1, groups=3), (2, 6, 5, 5)),
    "2d, depthwise": (nn.Conv2d(4, 4, 3, stride=2, groups=4), (2, 4, 7, 7)),
    "2d, same": (nn.Conv2d(2, 3, (5, 3), padding="same"), (2, 2, 6, 6)),
    "2d, same, even": (nn.Conv2d(2, 3, (4, 2), padding="same", dilation=2), (2, 2, 9, 9)),
    "2d, valid": (nn.Conv2d(2, 3, 3, padding="valid"), (2, 2, 6, 6)),
    "3d": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 3, 5)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 4, 5)),
    "transposed 2d, groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (2, 4, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2, 3)),
}


def site_of(module: nn.Module) -> NetworkSite:
    weight = module.weight
    assert isinstance(weight, Tensor)
    kind = "conv_transpose" if type(module).__name__.startswith("ConvTranspose") else "conv"
    if isinstance(module, nn.Linear):
        kind = "linear"
    return NetworkSite("x", kind, "x.weight", tuple(weight.shape), getattr(module, "groups", 1))


def multiplied(site: NetworkSite, module: nn.Module, rows: Tensor) -> Tensor:
    """[rows, out] of what the site's matrix makes of `rows` [groups, rows, in]."""
    matrix = site.matrix(module.weight.detach())
    parts = matrix.view(rows.shape[0], -1, matrix.shape[1])
    return (rows @ parts.transpose(1, 2)).permute(1, 0, 2).flatten(1)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_all_rows_give_the_whole_output_of_a_convolution(name: str) -> None:
    module, shape = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    site = site_of(module)
    reader = Reader(module)
    rows = reader.rows(x, reader.draw(x, torch.Generator()))
    assert rows.shape[2] == site.matrix_shape[1]
    with torch.no_grad():
        wanted = module(x) - module.bias.view(-1, *[1] * (len(shape) - 2))
    found = multiplied(site, module, rows).view(shape[0], -1, site.matrix_shape[0]).transpose(1, 2)
    assert (found - wanted.flatten(2)).abs().max() < CLOSE


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_drawn_rows_are_some_of_all(name: str) -> None:
    module, shape = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole, part = Reader(module), Reader(module, share=0.3)
    every = whole.rows(x, whole.draw(x, torch.Generator()))
    drawn = part.rows(x, part.draw(x, torch.Generator().manual_seed(1)))
    assert 0.3 * every.shape[1] <= drawn.shape[1] < every.shape[1]
    for group in range(every.shape[0]):
        away = (drawn[group][:, None] - every[group]).abs().amax(2)
        assert not away.amin(1).any()


def test_a_picture_without_a_batch_axis_is_one_of_a_batch() -> None:
    module = nn.Conv2d(3, 5, 3)
    x, reader = torch.randn(3, 6, 6), Reader(module)
    places = reader.draw(x, torch.Generator())
    assert torch.equal(reader.rows(x, places), reader.rows(x[None], places))


def test_rows_of_a_linear_map_are_those_of_all_axes() -> None:
    module = nn.Linear(4, 3)
    x = torch.randn(2, 5, 4)
    whole, part = Reader(module), Reader(module, share=0.5)
    assert torch.equal(whole.rows(x, whole.draw(x, torch.Generator()))[0], x.view(10, 4))
    assert part.rows(x, part.draw(x, torch.Generator())).shape == (1, 5, 4)
