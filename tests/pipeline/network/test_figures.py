"""What quantization costs a trained ResNet-20, on pictures that calibration has not seen."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.vision.data import small_pictures
from benchmarks.vision.networks import ResNet20
from pennyweight.models.network import Network, capture
from pennyweight.models.network.network import Inputs
from pennyweight.pipeline.network import NetworkOptions, quantize_network

DATA = Path(__file__).parents[3] / ".." / "shared" / "data"
WEIGHTS = DATA / "models" / "resnet20-cifar10" / "model.safetensors"
NEAREST = {"solver": "nearest", "fit": "minmax", "ranges": "minmax"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WEIGHTS.exists(), reason="needs ../shared/data, which is not part of the repository"),
]


@cache
def resnet() -> tuple[Network, list[Inputs], Tensor, Tensor]:
    """The network, its calibration batches, and 2,000 pictures with labels."""
    net = ResNet20().eval()
    net.load_state_dict(load_file(WEIGHTS))
    calibration = torch.from_numpy(small_pictures(DATA, "calibration")[0])
    pictures, labels = (torch.from_numpy(np.asarray(part)) for part in small_pictures(DATA, "test"))
    network = capture(net, calibration[:2])
    return network, [Inputs((part,)) for part in calibration.split(50)], pictures, labels


def accuracy(module: nn.Module) -> float:
    """Per cent of the pictures."""
    _, _, pictures, labels = resnet()
    with torch.no_grad():
        right = [module(part).argmax(1) for part in pictures.split(200)]
    return 100 * float((torch.cat(right) == labels).float().mean())


def quantized(**options: object) -> float:
    network, batches, _, _ = resnet()
    result = quantize_network(network, batches, NetworkOptions(**options))  # type: ignore[arg-type]
    return accuracy(result.quantized.simulated())


def lost(**options: object) -> float:
    """Points."""
    return accuracy(resnet()[0].graph) - quantized(**options)


# The bounds that were asked for; what was measured is in docs/networks.md. 2,000 pictures: 0.05 points each.
@pytest.mark.parametrize(("scheme", "most"), [("w8a8-channel", 0.3), ("w4a8-channel", 1.0), ("int4-channel", 1.0)])
@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_eight_and_four_bits_cost_little(scheme: str, most: float, effort: str) -> None:
    assert lost(scheme=scheme, effort=effort) <= most


def test_four_bits_are_better_than_nearest_with_min_and_max() -> None:
    assert lost(scheme="w4a8-channel") <= lost(scheme="w4a8-channel", **NEAREST) - 1.5


@pytest.mark.parametrize(("scheme", "most"), [("int3-channel", 1.0), ("int2-channel", 3.0)])
def test_three_and_two_bits_stay_near_where_nearest_guesses(scheme: str, most: float) -> None:
    assert lost(scheme=scheme) <= most
    assert lost(scheme=scheme, **NEAREST) > 15
