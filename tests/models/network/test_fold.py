"""Folding batch norms changes the graph and, but for rounding, not the function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pennyweight.models.network import capture, fold_batch_norms
from pennyweight.models.network.fold import foldable, norm_as_line
from pennyweight.models.network.network import module_calls
from tests.models.network.zoo import case, used

# In float64 the sums of at most a few hundred products: 2^-52 times their number, with a margin.
ROUNDING = 1e-12


class Pair(nn.Module):
    def __init__(self, maker: nn.Module, norm: nn.Module, *, reads_twice: bool = False, calls: int = 1) -> None:
        super().__init__()
        used(norm)
        self.maker, self.norm, self.reads_twice, self.calls = maker, norm, reads_twice, calls

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            y = self.maker(x)
            x = self.norm(y) + y if self.reads_twice else self.norm(y)
        return x


FOLDED: dict[str, tuple[nn.Module, nn.Module, Tensor]] = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), torch.randn(2, 4, 7)),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), torch.randn(2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False), torch.randn(2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), torch.randn(2, 2, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6, eps=0.1), torch.randn(2, 4, 5, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(3, 4)),
}
KEPT: dict[str, tuple[nn.Module, Tensor]] = {
    # The norm's channels are the second axis, those of a linear map the last.
    "linear over tokens": (Pair(nn.Linear(4, 5), nn.BatchNorm1d(5)), torch.randn(2, 5, 4)),
    "read twice": (
        Pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), reads_twice=True),
        torch.randn(2, 4, 5, 5),
    ),
    "called twice": (Pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), calls=2), torch.randn(2, 4, 5, 5)),
    "without statistics": (
        Pair(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        torch.randn(2, 4, 5, 5),
    ),
    "an embedding": (Pair(nn.Embedding(10, 5), nn.BatchNorm1d(5)), torch.randint(0, 10, (4,))),
    "nothing before": (Pair(nn.ReLU(), nn.BatchNorm2d(4)), torch.randn(2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_network_is_the_same_function(name: str) -> None:
    maker, norm, x = FOLDED[name]
    net = Pair(maker, norm).double().eval()
    x = x.double()
    network = capture(net, x)
    folded = fold_batch_norms(network)
    assert [type(module) for _, module in module_calls(folded.graph)] == [type(maker)]
    expected = net(x).detach()
    assert float((folded.graph(x).detach() - expected).abs().max()) < ROUNDING * float(expected.abs().max())
    # The network it came from has its norm still.
    assert torch.equal(network.graph(x), expected)
    assert [site.name for site in folded.sites] == ["maker"]


@pytest.mark.parametrize("name", KEPT)
def test_other_batch_norms_stay(name: str) -> None:
    net, x = KEPT[name]
    network = capture(net, x)
    assert foldable(network) == {}
    assert torch.equal(fold_batch_norms(network).graph(x), net.eval()(x))


def test_a_deep_network_is_folded_in_every_block() -> None:
    net, example = case("mobile")
    folded = fold_batch_norms(capture(net, example))
    assert not [node for node, module in module_calls(folded.graph) if isinstance(module, nn.BatchNorm2d)]
    expected = net.eval()(example).detach()
    # Each of the nine layers rounds weights and sums anew: some units of 2^-24 of the largest number.
    assert float((folded.graph(example).detach() - expected).abs().max()) < 2**-18 * float(expected.abs().max())
    folded.graph.train()
    assert any(isinstance(module, nn.Dropout) for _, module in module_calls(folded.graph))


def test_the_line_of_a_norm_is_the_norm() -> None:
    norm: Any = nn.BatchNorm2d(3, eps=0.01).eval()
    used(norm)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    scale, shift = norm_as_line(norm)
    expected = norm.double()(x)
    assert torch.allclose(x * scale[:, None, None] + shift[:, None, None], expected, rtol=ROUNDING, atol=ROUNDING)


def test_a_weight_with_two_names_is_folded_under_both() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.norm = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.BatchNorm2d(4)
            used(self.norm)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(nn.functional.conv2d(x, self.k))

    folded = fold_batch_norms(capture(Root(), torch.randn(2, 3, 4, 4)))
    assert torch.equal(folded.graph.get_parameter("k"), folded.weight(folded.sites[0]))
