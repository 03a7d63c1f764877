from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pennyweight.models.network import Network, capture
from pennyweight.pipeline.network.channels import Channels, channels_of
from pennyweight.pipeline.network.equalize import equalized
from pennyweight.transforms.equalize import SWEEPS
from tests.pipeline.network.nets import BETWEEN, SIZE, STEPS, Net

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
