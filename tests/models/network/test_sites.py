"""Weights as matrices, and networks whose weights and edges are rounded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.models.network import QuantizedNetwork, capture
from pennyweight.models.network.quantized import Rounded, RoundedDynamically
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight, parse_scheme
from pennyweight.schemes.activation import UINT8, ActivationScheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest
from tests.models.network.zoo import Shared, case, pictures


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_weight_as_a_matrix_has_a_row_for_each_channel_out(axes: int, groups: int, is_transposed: bool) -> None:
    kinds = {
        False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    }
    conv = kinds[is_transposed][axes - 1](4, 6, 3, groups=groups, bias=False)
    x = torch.randn(2, 4, *[5] * axes)
    (site,) = capture(nn.Sequential(conv), x).sites
    matrix = site.matrix(conv.weight.detach())
    assert matrix.shape == site.matrix_shape == (6, 4 // groups * 3**axes)
    assert torch.equal(site.tensor(matrix), conv.weight)
    # What happens to one row happens to one channel.
    matrix = matrix.clone()
    matrix[4] *= 2
    before = conv(x)
    with torch.no_grad():
        conv.weight.copy_(site.tensor(matrix))
    expected = before.clone()
    expected[:, 4] *= 2
    assert torch.allclose(conv(x), expected, rtol=1e-5, atol=1e-6)


def test_the_columns_of_a_convolutions_matrix_are_those_of_unfold() -> None:
    conv, x = nn.Conv2d(4, 6, 3, bias=False), pictures(4)
    (site,) = capture(nn.Sequential(conv), x).sites
    columns = functional.unfold(x, 3)
    expected = conv(x).flatten(2)
    assert torch.allclose(site.matrix(conv.weight) @ columns, expected, rtol=1e-5, atol=1e-5)


def rounded(weight: Tensor, scheme: str = "int4-channel") -> QuantizedWeight:
    chosen = parse_scheme(scheme).with_scale_dtype(torch.float32)
    return Nearest().solve(weight.detach(), chosen, Statistics()).weight


def test_a_simulated_network_computes_with_decoded_weights_and_rounded_edges() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval(), pictures()
    network = capture(net, x)
    weights = {site.name: rounded(site.matrix(network.weight(site))) for site in network.sites}
    scheme = ActivationScheme()
    edge = next(node.name for node in network.graph.graph.nodes if "relu" in node.name)
    plan = Plan({name: weight.scheme for name, weight in weights.items()}, edges={"input_1": scheme, edge: scheme})
    edges = {"input_1": scheme.parameters(-3.0, 3.0), edge: scheme.parameters(0.0, 2.0)}
    simulated = QuantizedNetwork(network, weights, edges, plan).simulated()
    decoded = [network.sites[i].tensor(weights[network.sites[i].name].dequantize()) for i in range(2)]
    y = functional.conv2d(edges["input_1"].round_trip(x), decoded[0], net[0].bias).relu()
    y = functional.conv2d(edges[edge].round_trip(y), decoded[1], net[2].bias)
    assert torch.equal(simulated(x), y)
    # The network itself is as it was.
    assert torch.equal(network.graph(x), net(x))


class Around(nn.Module):
    """A linear map behind a dropout, and one way around them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.drop(x))


def test_a_dynamic_edge_has_the_range_of_each_tensor_and_linear_maps_alone_read_it_rounded() -> None:
    network = capture(Around().eval(), torch.randn(2, 4))
    site = network.sites[0]
    weight = rounded(network.weight(site))
    plan = Plan({}, edges={"x": ActivationScheme(is_dynamic=True)})
    simulated = QuantizedNetwork(network, {site.name: weight}, {}, plan).simulated()

    def expected(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return x + functional.linear(seen, weight.dequantize(), network.graph.linear.bias)

    x = torch.tensor([[0.0, 1.0, 2.0, 255.0]])
    assert torch.equal(simulated(x), expected(x, x))
    x[0, 1] = 1.25
    assert torch.equal(simulated(x), expected(x, x.round()))
    assert RoundedDynamically(ActivationScheme(is_dynamic=True))(torch.empty(0, 4)).shape == (0, 4)


def test_rounding_keeps_the_type() -> None:
    parameters = ActivationScheme().parameters(-1.0, 1.0)
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        assert Rounded(parameters)(torch.randn(3).to(kind)).dtype == kind


def test_all_places_of_a_tied_weight_are_rounded() -> None:
    network = capture(Shared(), torch.randn(3, 4))
    site = network.sites[0]
    simulated = QuantizedNetwork(network, {site.name: rounded(network.weight(site))}).simulated()
    assert simulated.get_parameter("tied.weight") is simulated.get_parameter("twice.weight")
    assert not torch.equal(simulated.get_parameter("tied.weight"), network.weight(site))


def test_recurrent_weights_can_be_rounded() -> None:
    net, x = case("lstm deep")
    network = capture(net, x)
    weights = {site.name: rounded(site.matrix(network.weight(site)), "int8-channel") for site in network.sites}
    simulated = QuantizedNetwork(network, weights).simulated()
    with torch.no_grad():
        for site in network.sites:
            net.get_parameter(site.parameter).copy_(site.tensor(weights[site.name].dequantize()))
    assert torch.equal(simulated(x)[0], net.eval()(x)[0])


def test_an_edge_that_an_output_is_too() -> None:
    network = capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    scheme = ActivationScheme()
    parameters = scheme.parameters(-1, 1)
    found = QuantizedNetwork(network, {}, {"linear": parameters}, Plan({}, edges={"linear": scheme})).simulated()
    x = torch.randn(2, 4)
    assert torch.equal(found(x), parameters.round_trip(network.graph(x)))
    assert UINT8.bits == 8
