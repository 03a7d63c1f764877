from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pennyweight.models.network import Network, capture, fold_batch_norms
from pennyweight.models.network.blocks import NetworkBlock, partition
from pennyweight.models.network.part import Parts, Recorder
from tests.models.network.zoo import ViT, case, mobile, pictures

EVERY = [
    "conv2d grouped", "conv_transpose3d", "embedding bag", "lstm deep", "gru", "batch norm without statistics",
    "shared", "functional", "in place", "parts", "by name", "constants among inputs", "a fixed batch of one",
    "attention with other keys", "transformer", "unet", "products",
]  # fmt: skip


class Plain(nn.Module):
    """Convolutions one after the other, a pool, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())))
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, bias=False))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tail(self.body(x)).mean((2, 3)))
        return logits.softmax(-1)


class Deep(nn.Module):
    """A U-Net with two convolutions a level, more than one block holds."""

    def __init__(self) -> None:
        super().__init__()

        def level(taken: int, given: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(taken, given, 3, padding=1), nn.ReLU(), nn.Conv2d(given, given, 3, padding=1), nn.ReLU()
            )

        self.down = nn.ModuleList([level(3, 4), level(4, 6), level(6, 8)])
        self.up = nn.ModuleList([level(14, 6), level(10, 4)])
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down[0](x)
        second = self.down[1](nn.functional.max_pool2d(first, 2))
        third = self.down[2](nn.functional.max_pool2d(second, 2))
        y = self.up[0](torch.cat([second, nn.functional.interpolate(third, scale_factor=2)], 1))
        y = self.up[1](torch.cat([first, nn.functional.interpolate(y, scale_factor=2)], 1))
        made: Tensor = self.out(y)
        return made


class Woven(nn.Module):
    """Two streams that each read the other in every layer: no run of few layers gives one value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(12)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = x, x.neg()
        for index in range(0, 12, 2):
            one, other = self.layers[index](other).relu() + one, self.layers[index + 1](one).relu() + other
        return one, other


def sites_of(blocks: tuple[NetworkBlock, ...]) -> list[tuple[str, ...]]:
    return [block.sites for block in blocks]


def test_inverted_residuals_come_out_whole() -> None:
    network = fold_batch_norms(capture(mobile(), pictures()))
    blocks = partition(network)
    expected = [("0",), *(tuple(f"{block}.body.{part}" for part in (0, 3, 6)) for block in (3, 4)), ("8",)]
    assert sites_of(blocks) == expected
    assert [block.target for block in blocks] == [*(block.outputs[0] for block in blocks)]
    assert [block.inputs for block in blocks[1:]] == [block.outputs for block in blocks[:-1]]
    # The activation belongs to the convolution, the pool to the head behind it.
    assert blocks[0].nodes[-1].startswith("hardswish")
    assert blocks[-1].nodes[0] == "adaptive_avg_pool2d"


def test_attention_and_feed_forward_are_blocks_of_their_own() -> None:
    blocks = partition(capture(ViT(), pictures()))
    names = [[site.split(".")[-1] for site in block.sites] for block in blocks]
    assert names[0] == ["patches"]
    assert names[1:-1] == [["in_proj", "out_proj"], ["linear1", "linear2"]] * 2
    assert names[-1] == ["head"]


def test_values_that_no_weight_touches_do_not_keep_blocks_together() -> None:
    network = capture(*case("bert"))
    blocks = partition(network)
    assert [len(block.sites) for block in blocks if block.sites and "layer" in block.sites[0]] == [4, 2, 4, 2]
    assert all(block.target is not None for block in blocks)
    made = {name for block in blocks for name in block.nodes}
    masks = {name for block in blocks for name in block.inputs} - made
    # The mask that is read by both layers is computed from the input alone.
    assert sum(masks & set(block.inputs) != set() for block in blocks) >= 2


def test_single_sites_of_one_small_module_are_learned_together() -> None:
    blocks = partition(capture(Plain(), pictures()))
    assert sites_of(blocks) == [*((f"body.{2 * index}",) for index in range(10)), ("tail.0", "tail.1"), ("head",), ()]
    # Probabilities say less than logits: what ends the network is not what its last site is judged by.
    assert blocks[-2].target == "linear"


def test_a_u_net_is_cut_where_one_value_is_all_that_is_read_behind() -> None:
    blocks = partition(capture(Deep(), pictures()), largest=4)
    levels = [tuple(f"{level}.{part}" for part in (0, 2)) for level in ("down.0", "down.1", "down.2", "up.0", "up.1")]
    # The level that is read again comes together with the deeper one, up to where both are one value.
    assert sites_of(blocks) == [levels[0], levels[1] + levels[2], levels[3], levels[4], ("out",)]
    assert [block.target for block in blocks] == [block.outputs[0] for block in blocks]


def test_where_nothing_can_be_cut_every_site_is_a_block() -> None:
    blocks = partition(capture(Woven(), torch.randn(3, 4)))
    assert [len(block.sites) for block in blocks if block.sites] == [1] * 12
    assert all(block.target in block.nodes for block in blocks if block.sites)


@pytest.mark.parametrize("name", EVERY)
def test_blocks_one_after_the_other_are_the_network(name: str) -> None:
    network = capture(*case(name))
    blocks = partition(network)
    own = {site.name: network.weight(site).detach() for site in network.sites}
    assert [site for block in blocks for site in block.sites] == [site.name for site in network.sites]
    with torch.no_grad():
        expected = network(network.example)
    for weights in ({}, own):
        assert_same(outputs(network, blocks, weights), expected)


def outputs(network: Network, blocks: tuple[NetworkBlock, ...], weights: dict[str, Tensor]) -> Any:
    """What the network gives, computed block by block from nothing but what each says that it reads."""
    parts = Parts(network)
    [end] = [node for node in network.graph.graph.nodes if node.op == "output"]
    made = {name for block in blocks for name in block.nodes}
    wanted = {name for block in blocks for name in block.inputs} | {node.name for node in end.all_input_nodes}
    values = Recorder.values(network, network.example, frozenset(wanted - made))
    with torch.no_grad():
        for block in blocks:
            found = parts.run(block.nodes, {name: values[name] for name in block.inputs}, weights=weights)
            values |= {name: found[name] for name in block.outputs}
    return torch.fx.node.map_arg(end.args[0], lambda node: values[node.name])


# Matrix products of the library sum in an order that depends on where their operands lie in memory.
CLOSE = 1e-5


def assert_same(found: Any, expected: Any) -> None:
    mine, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=CLOSE, atol=CLOSE)
        else:
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize(
    "name", ["unet", "depthwise", "conv_transpose2d", "conv3d", "lstm", "gru", "embedding", "shared"]
)
def test_other_weights_take_the_place_of_the_networks_own(name: str) -> None:
    network = capture(*case(name))
    other = network.copied()
    weights = {site.name: torch.randn(site.shape) for site in network.sites}
    with torch.no_grad():
        for site in network.sites:
            other.weight(site).copy_(weights[site.name])
    before = {key: tensor.clone() for key, tensor in network.graph.state_dict().items()}
    with torch.no_grad():
        expected = other(other.example)
    assert_same(outputs(network, partition(network), weights), expected)
    for key, tensor in network.graph.state_dict().items():
        assert torch.equal(tensor, before[key])
