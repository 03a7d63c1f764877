"""Ranges of the edges of networks, and where their error is looked at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.containers.onnx import edges_of
from pennyweight.core.errors import DataError
from pennyweight.models.network import capture
from pennyweight.models.network.network import Inputs, Network
from pennyweight.pipeline.network.activations import choose_ranges, histograms
from pennyweight.pipeline.network.consumers import consumers_of
from pennyweight.schemes.activation import UINT8, ActivationScheme
from pennyweight.stats.ranges.candidates import candidates
from tests.pipeline.network.subjects import subject

SCHEME = ActivationScheme()


def all_edges(network: Network) -> list[str]:
    return [edge.value for edge in edges_of(network, sites=[site.name for site in network.sites])]


def test_histograms_are_those_of_the_values_in_the_network() -> None:
    network, batches = subject("pictures")
    seen = histograms(network, batches, ["x", "relu"], None)
    whole = torch.cat([batch.args[0] for batch in batches])
    assert seen["x"].count == whole.numel()
    assert (seen["x"].low, seen["x"].high) == (whole.min().item(), whole.max().item())
    assert seen["relu"].low == 0


def test_an_infinite_value_is_named() -> None:
    network, batches = subject("pictures")
    poisoned = Inputs((batches[1].args[0].index_fill(0, torch.tensor([2]), torch.inf),))
    with pytest.raises(DataError, match="x: .* infinite"):
        histograms(network, [batches[0], poisoned], ["x"], None)


class Branches(nn.Module):
    """One value read by a pool that leads to a convolution, by an addition, and given out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu(self.one(x))
        y = functional.relu6(self.two(functional.gelu(functional.avg_pool2d(x, 3, stride=1, padding=1))))
        return self.three(x + y), x


def test_errors_are_looked_at_behind_sites_sums_and_at_the_end() -> None:
    network = capture(Branches(), torch.randn(2, 2, 6, 6))
    [value] = [node.name for node in network.graph.graph.nodes if node.name == "relu"]
    found = consumers_of(network, value, {value})
    [site] = network.site("two").nodes
    [behind] = [node.name for node in network.graph.graph.nodes if site in {x.name for x in node.all_input_nodes}]
    assert set(found.ends) == {"relu", "add", behind}
    assert found.reads == ()


def test_errors_are_not_looked_at_behind_another_edge() -> None:
    network = capture(Branches(), torch.randn(2, 2, 6, 6))
    found = consumers_of(network, "relu", {"relu", "avg_pool2d"})
    assert "avg_pool2d" in found.ends
    assert "gelu" not in found.nodes


def brute_force(network: Network, batches: list[Inputs], value: str, site: str) -> list[float]:
    """|y - ŷ|² of what `site` gives, `value` rounded, for each candidate."""
    seen = histograms(network, batches, [value], None)[value]
    module = network.graph.get_submodule(site)
    errors = []
    for one in candidates(seen, SCHEME):
        total = 0.0
        for batch in batches:
            x = batch.args[0]
            with torch.no_grad():
                total += float((module(x) - module(one.round_trip(x))).double().square().sum())
        errors.append(total)
    return errors


def test_the_range_is_that_with_which_the_consumer_changes_least() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        # The input with the long tail counts for nothing.
        module[0].weight[:, 3] = 1e-4
    x = torch.randn(60, 4)
    x[:, 3] *= 100
    network, batches = capture(module, x[:2]), [Inputs((x,))]
    edges = edges_of(network, sites=["0"])
    edge = edges[0]
    found = choose_ranges(network, batches, edges, SCHEME, chooser="output").parameters[edge.value]
    tried = candidates(histograms(network, batches, [edge.value], None)[edge.value], SCHEME)
    errors = brute_force(network, batches, edge.value, "0")
    assert found == tried[errors.index(min(errors))]
    assert found != choose_ranges(network, batches, edges, SCHEME, chooser="minmax").parameters[edge.value]
    assert found.high < x.max() / 2


@pytest.mark.parametrize("chooser", ["output", "minmax", "moving-average", "percentile", "mse", "entropy"])
def test_edges_that_move_numbers_share_what_their_source_has(chooser: str) -> None:
    network, batches = subject("pictures")
    edges = edges_of(network, sites=[site.name for site in network.sites])
    found = choose_ranges(network, batches, edges, SCHEME, chooser=chooser)
    assert list(found.parameters) == all_edges(network)
    shared = [edge for edge in edges if edge.source != edge.value]
    assert shared
    for edge in edges:
        parameters = found.parameters[edge.value]
        assert parameters == found.parameters[edge.source]
        assert parameters.round_trip(torch.zeros(1)).item() == 0
        assert parameters.element == UINT8
        assert found.records[edge.value].chooser == chooser


def test_the_share_of_numbers_that_is_cut_off_is_recorded() -> None:
    module = nn.Sequential(nn.Linear(1, 1))
    x = torch.cat([torch.linspace(0, 1, 9990), torch.full((10,), 500.0)])[:, None]
    network = capture(module, x[:2])
    edges = edges_of(network, sites=["0"])
    found = choose_ranges(network, [Inputs((x,))], edges, SCHEME, chooser="minmax")
    assert found.records[edges[0].value].clipped == 0
    cut = choose_ranges(network, [Inputs((x,))], edges, SCHEME, chooser="entropy").records[edges[0].value]
    assert cut.clipped == pytest.approx(0.001, rel=0.1)
    assert (cut.low, cut.high) == (0.0, 500.0)
