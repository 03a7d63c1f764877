"""What ONNX Runtime would do otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pennyweight.containers.onnx import read_onnx, write_onnx
from pennyweight.containers.onnx.bias import bias_codes, fits, with_scales_for_bias
from pennyweight.models.network import QuantizedNetwork
from pennyweight.schemes import QuantizedWeight, parse_scheme
from pennyweight.schemes.activation import UINT8, ActivationParameters, ActivationScheme
from tests.containers.onnx.networks import Encoder, Layers, Residual
from tests.containers.onnx.quantizing import (
    IGNORED,
    by_onnxruntime,
    by_openvino,
    distance,
    operations,
    quantized,
    simulated,
)

pytestmark = pytest.mark.filterwarnings(IGNORED)

FLOAT_ERROR = 5e-6
# Accuracy level 4: the input is rounded to 8 bits a block.
LEVEL_4_ERROR = 0.02
PICTURE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Line(nn.Module):
    """Three convolutions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(functional.relu(self.two(functional.relu6(self.one(x)))))


def line(scheme: str = "w8a8-channel", *, keep: tuple[str, ...] = (), edit: str = "") -> QuantizedNetwork:
    torch.manual_seed(0)
    net = Line()
    with torch.no_grad():
        # Rows of very different size: one scale for all of them would be seen.
        net.two.weight.mul_(torch.tensor([1.0, 1e-2, 1e-3, 1.0])[:, None, None, None])
        if edit == "dead":
            net.two.weight[1] = 0
            # Far from every multiple of the scale of the input, 6 / 255.
            net.two.bias[1] = 0.0123  # type: ignore[index]
            net.three.weight[:, 1] = 10.0
        if edit == "clamp":
            # Values on both sides of 6.
            net.one.bias.copy_(torch.tensor([5.5, 7.0, 0.1, -3.0]))  # type: ignore[union-attr]
        if edit == "large":
            net.two.weight[1] = 1e-12
            net.two.bias[1] = 0.5  # type: ignore[index]
    return quantized(net, PICTURE, scheme, keep=keep)


def codes_apart(network: QuantizedNetwork, path: Path) -> float:
    (found,), (expected,) = by_onnxruntime(path, PICTURE), simulated(network, PICTURE)
    return float(np.abs(found - expected).max() / list(network.activations.values())[-1].scale)


def test_a_site_kept_in_float_between_rounded_values_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = line(keep=("two",))
    report = write_onnx(network, path := tmp_path / "net.onnx")
    assert codes_apart(network, path) < 1e-3
    assert "FusedConv" in operations(path) or "Conv" in operations(path)
    assert any("ONNX Runtime would round the weights otherwise" in note for note in report.notes)
    monkeypatch.setattr("pennyweight.containers.onnx.write.guard", lambda graph: [])
    write_onnx(network, path)
    assert "FusedConv" not in operations(path)
    assert "Conv" not in operations(path)


def test_the_bias_of_a_row_of_zeros_is_exact(tmp_path: Path) -> None:
    network = line(edit="dead")
    scales = network.weights["two"].scales.clone()
    scales[1] = 1.0
    network = replace(network, weights={**network.weights, "two": replace(network.weights["two"], scales=scales)})
    write_onnx(network, path := tmp_path / "net.onnx")
    assert codes_apart(network, path) < 1e-3
    assert torch.equal(read_onnx(path)["two"].dequantize(), network.weights["two"].dequantize())


def test_a_bias_that_leaves_int32_is_added_in_float(tmp_path: Path) -> None:
    network = line(edit="large")
    report = write_onnx(network, path := tmp_path / "net.onnx")
    assert report.forms == {"one": "integers", "two": "decoded", "three": "integers"}
    assert any(note.startswith("two: a bias or a sum may leave int32") for note in report.notes)
    assert codes_apart(network, path) < 1e-3


def test_bias_codes_are_multiples_of_both_scales() -> None:
    weight = QuantizedWeight(
        torch.tensor([[128, 129], [0, 255]], dtype=torch.uint8), torch.tensor([[0.5], [-0.25]]), None,
        parse_scheme("int8-channel-f32"),
    )  # fmt: skip
    x = ActivationParameters(0.5, 10, UINT8)
    assert bias_codes(torch.tensor([1.125, 1.0]), weight, x).tolist() == [4, -8]
    # |0 1| and |-128 127| times 245.
    assert fits(torch.tensor([0.25 * (2.0**31 - 1 - 245), 0.0]), weight, x)
    assert not fits(torch.tensor([0.25 * 2.0**31, 0.0]), weight, x)
    assert with_scales_for_bias(weight, torch.tensor([1.0, 1.0]), 0.5) is not weight
    assert torch.equal(with_scales_for_bias(weight, torch.tensor([1.0, 1.0]), 0.5).scales, weight.scales)


@pytest.mark.parametrize("high", [6.0, 9.0])
def test_a_clamp_goes_only_where_rounding_clamps_as_it_does(high: float, tmp_path: Path) -> None:
    network = line(edit="clamp")
    wide = dict(network.activations) | {"relu6": ActivationScheme().parameters(0.0, high)}
    network = replace(network, activations=wide)
    write_onnx(network, path := tmp_path / "net.onnx")
    assert codes_apart(network, path) < 1.01
    # The convolution before the clamp is one of integers either way.
    assert operations(path).count("QLinearConv") == 3


@pytest.mark.parametrize("scheme", ["w4a8-channel", "int4-channel"])
def test_scales_below_0_are_read_by_both(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = turned(quantized(Residual(), PICTURE, scheme))
    for runtime, run in (("onnxruntime", by_onnxruntime), ("openvino", by_openvino)):
        write_onnx(network, path := tmp_path / f"{runtime}.onnx", runtime=runtime, accuracy_level=0)  # type: ignore[arg-type]
        assert distance(run(path, PICTURE), simulated(network, PICTURE)) < 0.02
    assert distance(simulated(network, PICTURE), simulated(turned(network), PICTURE)) > 0.1


def turned(network: QuantizedNetwork) -> QuantizedNetwork:
    """Every second row with a scale below 0: another function."""
    weights = {}
    for name, weight in network.weights.items():
        scales = weight.scales.clone()
        scales[::2] *= -1
        weights[name] = replace(weight, scales=scales)
    return replace(network, weights=weights)


@pytest.mark.parametrize("scheme", ["int4-g16", "int2-g16"])
def test_blocks_take_scales_below_0_at_every_accuracy_level(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (2, 5))
    network = turned(quantized(Encoder(32), tokens, scheme))
    for level, bound in ((0, FLOAT_ERROR), (4, LEVEL_4_ERROR)):
        report = write_onnx(network, path := tmp_path / "net.onnx", accuracy_level=level)
        assert distance(by_onnxruntime(path, tokens), simulated(network, tokens)) < bound
        told = [note for note in report.notes if "accuracy level" in note]
        assert bool(told) == (level == 4 or "int4" not in scheme)


def test_the_notes_name_what_is_slow_or_saturates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    notes = "\n".join(write_onnx(line(), tmp_path / "net.onnx").notes)
    assert "one, two, three: x86 processors without VNNI" in notes
    notes = "\n".join(write_onnx(line("w7a8-channel"), tmp_path / "net.onnx").notes)
    assert "VNNI" not in notes
    assert "stored in 8 bits a weight" in notes
    notes = "\n".join(write_onnx(line("int3-channel"), tmp_path / "net.onnx").notes)
    assert "decoded when a session is made" in notes
    assert "stored in 4 bits a weight" in notes


def test_matrices_and_batches_of_them_are_both_products_of_integers(tmp_path: Path) -> None:
    """QGemm needs zero points even where all are 0."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40)
    write_onnx(quantized(Layers(), x, "w8a8-channel"), path := tmp_path / "net.onnx")
    assert operations(path).count("QGemm") == 1
    assert operations(path).count("MatMulIntegerToFloat") + operations(path).count("QLinearMatMul") == 2
