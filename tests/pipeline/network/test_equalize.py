from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from pennyweight.models.network import Network, capture
from pennyweight.models.network.part import Recorder
from pennyweight.pipeline.network.channels import Channels, channels_of
from pennyweight.pipeline.network.equalize import equalized
from pennyweight.transforms.equalize import SWEEPS
from tests.models.network.zoo import case
from tests.pipeline.network.nets import BETWEEN, SIZE, STEPS, Net

aten = torch.ops.aten

# Relative to the largest output, in float64: rounding alone.
SAME = 1e-12
# Scales may still change by 1e-3 where they are accepted.
NEAR = 3e-3

IMAGES = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def captured(net: nn.Module, example: Tensor = IMAGES) -> Network:
    return capture(net.double(), example)


def assert_same(one: Network, other: Network, x: Tensor = IMAGES) -> None:
    with torch.no_grad():
        expected, found = one(x), other(x)
    assert (found - expected).abs().max() <= SAME * expected.abs().max()


def ranges(network: Network, channels: Channels) -> tuple[dict[int, float], dict[int, float]]:
    """By number of the channel: the largest |w| that makes it, the largest that reads it; weight by weight."""
    made, read = defaultdict[int, float](float), defaultdict[int, float](float)
    for name, each in channels.sites.items():
        site = network.site(name)
        matrix = site.matrix(network.weight(site).detach()).abs()
        groups = len(each.columns)
        for row, values in enumerate(matrix.tolist()):
            for column, value in enumerate(values):
                number = int(each.columns[row * groups // len(matrix), column])
                made[int(each.rows[row])] = max(made[int(each.rows[row])], value)
                read[number] = max(read[number], value)
    return made, read


# A network takes a second to capture: a failing one is not made smaller.
@settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(
    parts=st.lists(st.tuples(st.sampled_from(BETWEEN), st.sampled_from(STEPS)), min_size=1, max_size=4),
    head=st.sampled_from(["flatten", "mean"]),
    seed=st.integers(0, 99),
)
def test_the_function_of_any_chain_is_kept(parts: list[tuple[str, str]], head: str, seed: int) -> None:
    network = captured(Net(parts, head=head, seed=seed))
    changed, _ = equalized(network)
    assert_same(network, changed)


@pytest.mark.parametrize("between", BETWEEN)
def test_channels_are_equalized_through_every_function_that_lets_scales_through(between: str) -> None:
    network = captured(Net([(between, "conv"), (between, "one")]))
    changed, report = equalized(network)
    assert_same(network, changed)
    assert set(report.sites) == {"stem", "steps.0.conv", "steps.1.conv", "linear"}
    made, read = ranges(changed, channels_of(changed))
    assert report.channels == 12 == len(made.keys() & read.keys() - {0})
    for number in made.keys() & read.keys() - {0}:
        assert made[number] == pytest.approx(read[number], rel=NEAR)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("conv", 12), ("depthwise", 12), ("grouped", 12), ("transposed", 12), ("transposed_groups", 12),
        # The stream's channels are one set, whoever adds to it; the branch has its own.
        ("residual", 12), ("around", 8), ("two", 12), ("cat", 12),
        # Three of the stream's channels become others' of the sum; one goes out, one comes in.
        ("shortcut", 9),
        # What makes the gate keeps its rows, and reads scaled columns.
        ("gate", 12),
    ],
)  # fmt: skip
def test_channels_of_every_kind_of_site_are_equalized(step: str, expected: int) -> None:
    network = captured(Net([("relu", step), ("relu", "one")], channels=4))
    changed, report = equalized(network)
    assert_same(network, changed)
    assert report.channels == expected
    if report.sweeps < SWEEPS:
        again, _ = equalized(changed)
        for site in network.sites:
            assert torch.allclose(again.weight(site), changed.weight(site), rtol=NEAR)


@pytest.mark.parametrize("step", ["conv", "one", "depthwise", "grouped", "transposed", "transposed_groups"])
def test_ranges_of_channels_that_one_site_makes_and_one_reads_are_equal(step: str) -> None:
    network = captured(Net([("relu", step), ("relu", "one")], channels=4))
    changed, _ = equalized(network)
    made, read = ranges(changed, channels_of(changed))
    assert len(made.keys() & read.keys() - {0}) == 12
    for number in made.keys() & read.keys() - {0}:
        assert made[number] == pytest.approx(read[number], rel=NEAR)


ZOO = [
    "conv2d same", "conv2d reflect", "conv3d", "conv_transpose1d", "conv_transpose3d", "embedding", "lstm deep", "gru",
    "batch norm", "dropouts", "shared", "functional", "subclass", "in place", "parts", "by name", "a fixed batch",
    "attention", "bert", "mobile", "unet", "vit", "products",
]  # fmt: skip
# Sums in float32.
FLOAT32 = 1e-4


@pytest.mark.parametrize("name", ZOO)
def test_networks_of_every_kind_keep_their_function(name: str) -> None:
    network = capture(*case(name))
    changed, _ = equalized(network, [network.example])
    with torch.no_grad():
        found, expected = (pytree.tree_leaves(net(network.example)) for net in (changed, network))
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Tensor):
            assert torch.allclose(one, other, rtol=FLOAT32, atol=FLOAT32 * float(other.abs().max()))


def test_the_network_that_was_given_stays() -> None:
    network = captured(Net([("relu", "conv")]))
    before = {name: tensor.clone() for name, tensor in network.graph.state_dict().items()}
    equalized(network, [IMAGES])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.graph.state_dict().items())


class Two(nn.Module):
    """A function between two sites; `bias` is added to the first one's."""

    def __init__(self, kind: str = "relu6", *, bias: float = 0.0, size: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, size, padding=size // 2)
        with torch.no_grad():
            self.first.weight *= torch.tensor([1.0, 3.0, 0.1, 2.0])[:, None, None, None]
            assert self.first.bias is not None
            self.first.bias += bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        functions = {
            "relu": torch.relu, "relu6": functional.relu6, "hardtanh": functional.hardtanh, "tanh": torch.tanh,
            "clamp": lambda y: y.clamp(0, 6), "half": lambda y: functional.hardtanh(y, 0.0, 6.0),
            "plus": lambda y: torch.relu(y) + 1.0, "whole": lambda y: y.to(torch.int64).to(y.dtype),
        }  # fmt: skip
        made: Tensor = self.second(functions[self.kind](y))
        return made


@pytest.mark.parametrize("kind", ["relu6", "clamp", "half"])
def test_an_upper_bound_that_no_data_reaches_goes(kind: str) -> None:
    network = captured(Two(kind))
    for batches in (None, [IMAGES, IMAGES * 10]):
        changed, report = equalized(network, batches)
        assert_same(network, changed, IMAGES * 10)
        assert report.channels == 0
        assert not report.replaced
        assert "cuts its values off" in report.kept["first"]
    changed, report = equalized(network, [IMAGES, IMAGES * 0.5])
    assert_same(network, changed, IMAGES)
    assert report.channels == 4
    [replaced] = report.replaced
    assert next(node for node in changed.graph.graph.nodes if node.name == replaced).target == aten.relu.default
    assert report.kept == {"second": "it goes out of the network"}


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("hardtanh", "cuts its values off"),
        ("tanh", "tanh (tanh) lets no scale through"),
        ("plus", "adds a constant"),
        ("whole", "makes whole numbers of them"),
    ],
)
def test_what_stands_in_the_way_is_said(kind: str, why: str) -> None:
    _, report = equalized(captured(Two(kind)))
    assert why in report.kept["first"]
    assert report.channels == 0
    assert not report.sites


def test_what_is_always_added_goes_into_the_biases_behind() -> None:
    """All that the first site gives is above 0 with a bias of 50: its lowest values come down."""
    network = captured(Two("relu", bias=50.0))
    changed, report = equalized(network, [IMAGES])
    assert_same(network, changed)
    assert report.absorbed == {"relu": 4}
    value = Recorder.values(changed, changed.inputs(IMAGES), frozenset({"relu"}))["relu"]
    lowest = value.movedim(1, 0).flatten(1)
    # The mean less three deviations, or the lowest value where that is nearer.
    assert bool((lowest.amin(1) >= 0).all())
    assert bool(((lowest.amin(1) < 1e-9) | (lowest.mean(1) - 3 * lowest.std(1, correction=0) < 1e-9)).all())


def test_zeros_around_a_picture_keep_what_is_added() -> None:
    """The second site would add what it misses at the edges."""
    _, report = equalized(captured(Two("relu", bias=50.0, size=3)), [IMAGES])
    assert not report.absorbed


def test_a_large_example_is_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    network = captured(Net([("relu", "conv")]), torch.randn(64, 3, SIZE, SIZE, dtype=torch.float64))
    seen: list[int] = []
    conv = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, *rest: seen.append(len(x)) or conv(self, x, *rest))
    channels_of(network)
    assert set(seen) == {2}
