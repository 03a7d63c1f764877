"""Which values are rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.containers.onnx.edges import Edge, edges_of
from pennyweight.models.network import Network, capture, fold_batch_norms
from tests.containers.onnx.networks import Encoder, Gated, Residual
from tests.containers.onnx.quantizing import IGNORED

pytestmark = pytest.mark.filterwarnings(IGNORED)
PICTURE = torch.zeros(2, 3, 8, 8)


def network(net: nn.Module, example: Tensor) -> Network:
    return fold_batch_norms(capture(net, example))


def edges(net: Network, *without: str, is_dynamic: bool = False) -> list[tuple[str, str]]:
    sites = [site.name for site in net.sites if site.name not in without]
    return [(edge.value, edge.source) for edge in edges_of(net, sites=sites, is_dynamic=is_dynamic)]


def own(*names: str) -> list[tuple[str, str]]:
    return [(name, name) for name in names]


def test_a_residual_block_is_integers_from_the_picture_to_what_the_last_linear_map_reads() -> None:
    assert edges(network(Residual(), PICTURE)) == [
        *own("x", "relu", "relu_1", "conv2d_2"),
        ("pad", "relu"),
        *own("relu_2", "adaptive_avg_pool2d"),
        ("flatten", "adaptive_avg_pool2d"),
    ]


def test_a_sum_is_in_float_where_a_part_of_it_is() -> None:
    found = [value for value, _ in edges(network(Residual(), PICTURE), "two")]
    assert "conv2d_2" not in found
    assert "adaptive_avg_pool2d" not in found
    assert "flatten" in found


def test_gates_pools_and_concatenations_are_integers() -> None:
    assert edges(network(Gated(), torch.zeros(2, 4, 8, 8))) == [
        *own("x", "relu6", "mean", "relu", "conv2d_2", "sigmoid", "mul"),
        ("max_pool2d", "mul"),
        *own("conv2d_3", "leaky_relu", "avg_pool2d", "cat", "conv2d_4"),
    ]


def test_an_encoder_rounds_what_linear_maps_read_and_nothing_else() -> None:
    net = network(Encoder(), torch.zeros(2, 5, dtype=torch.long))
    assert edges(net) == own("embedding", "flatten", "layer_norm", "gelu")
    assert edges(net, is_dynamic=True) == edges(net)


def test_without_sites_nothing_is_rounded() -> None:
    net = network(Residual(), PICTURE)
    assert edges_of(net, sites=()) == ()
    assert edges_of(net, sites=["head"]) == (Edge("flatten", "flatten"),)


class Forked(nn.Module):
    """A clamp of a convolution that another operation reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.up = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.up(self.two(y.relu()) + y).exp()


def test_a_value_before_a_clamp_is_rounded_where_others_read_it_and_transposed_convolutions_are_in_float() -> None:
    assert edges(network(Forked(), PICTURE)) == own("x", "conv2d", "relu", "conv2d_1")


class Chained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.drop(functional.hardtanh(self.one(x))))


def test_dropout_is_no_value_of_its_own_and_the_last_linear_map_gives_floats() -> None:
    assert edges(network(Chained(), torch.zeros(2, 4))) == own("x", "hardtanh")
    assert edges(network(Chained(), torch.zeros(2, 4)), is_dynamic=True) == own("x", "hardtanh")
