"""What ONNX Runtime computes from a file is what the quantized network computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pennyweight.containers.onnx import read_onnx, size_bytes, write_float_onnx, write_onnx
from pennyweight.models.network import Network, QuantizedNetwork, capture, fold_batch_norms
from pennyweight.schemes.activation import parse_network_scheme
from tests.containers.onnx.networks import (
    Convolutions,
    Encoder,
    Gated,
    Layers,
    Residual,
    Sequences,
    Tied,
)
from tests.containers.onnx.quantizing import (
    IGNORED,
    by_onnxruntime,
    distance,
    operations,
    quantized,
    rounded,
    simulated,
)

pytestmark = pytest.mark.filterwarnings(IGNORED)

# Sums of a few hundred float32 products in another order.
FLOAT_ERROR = 5e-6
# A sum on the edge between two codes may become either; one that does moves those behind it.
CODES, MOST_CODES, SHARE = 1.01, 4, 0.01


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(1))


def axes(batch: int) -> tuple[torch.Tensor, ...]:
    return rand(batch, 4, 9), rand(batch, 4, 5, 5), rand(batch, 4, 4, 4, 4)


# The network, its example, and inputs of another batch size.
CASES: dict[str, tuple[Callable[[], nn.Module], Any, tuple[torch.Tensor, ...]]] = {
    "residual": (Residual, rand(2, 3, 8, 8), (rand(3, 3, 8, 8),)),
    "gated": (Gated, rand(2, 4, 8, 8), (rand(3, 4, 8, 8),)),
    "convolutions": (Convolutions, axes(2), axes(3)),
    "sequences": (Sequences, rand(2, 5, 6), (rand(3, 5, 6),)),
    "encoder": (lambda: Encoder(32), tokens(2, 5), (tokens(3, 7),)),
    "layers": (Layers, rand(2, 3, 40), (rand(5, 3, 40),)),
    "tied": (Tied, tokens(2, 5), (tokens(3, 7),)),
}


@cache
def captured(case: str) -> Network:
    build, example, _ = CASES[case]
    torch.manual_seed(0)
    return fold_batch_norms(capture(build(), example))


def make(case: str, scheme: str) -> tuple[QuantizedNetwork, tuple[torch.Tensor, ...]]:
    return rounded(captured(case), scheme), CASES[case][2]


def check_the_codes(network: QuantizedNetwork, path: Path, scheme: str, **given: Any) -> None:
    """Codes in the file are the network's, and their bytes are those that were foretold."""
    chosen = parse_network_scheme(scheme)
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for name, weight in read_onnx(path).items():
        site = network.network.site(name)
        assert torch.equal(weight.codes, network.weights[name].codes)
        assert weight.scheme == chosen.weight
        assert torch.equal(weight.dequantize(), network.weights[name].dequantize())
        parts = [stored[f"{name}.{part}"] for part in ("codes", "scales", "zeros") if f"{name}.{part}" in stored]
        bytes_in_file = sum(len(part.raw_data) for part in parts)
        assert bytes_in_file == size_bytes(chosen.weight, site, activation=chosen.activation, **given)


WEIGHTS = (
    "int8-channel", "int8-tensor", "uint8-channel-asym", "int5-channel", "int4-channel", "uint4-channel-asym",
    "uint8-channel-fzero", "int4-channel-fzero", "int3-channel", "int2-channel", "uint2-channel-asym",
)  # fmt: skip


def some(case: str, quick: tuple[str, ...], rest: tuple[str, ...]) -> list[Any]:
    """Cases of which `rest` are slow."""
    slow = [pytest.param(case, scheme, marks=pytest.mark.slow) for scheme in rest if scheme not in quick]
    return [(case, scheme) for scheme in quick] + slow


@pytest.mark.parametrize(
    ("case", "scheme"),
    some("layers", ("int8-tensor", "uint8-channel-asym", "int4-channel", "uint2-channel-asym"), WEIGHTS)
    + some("convolutions", ("int4-channel", "uint8-channel-fzero", "uint2-channel-asym"), WEIGHTS),
)
def test_weights_alone_give_what_decoded_weights_give(case: str, scheme: str, tmp_path: Path) -> None:
    network, inputs = make(case, scheme)
    report = write_onnx(network, path := tmp_path / "net.onnx", accuracy_level=0)
    onnx.checker.check_model(str(path), full_check=True)
    assert distance(by_onnxruntime(path, *inputs), simulated(network, *inputs)) < FLOAT_ERROR
    check_the_codes(network, path, scheme)
    assert report.file_bytes == path.stat().st_size
    assert report.sizes.keys() == network.weights.keys()


OTHERS = ("int8-channel", "int4-channel", "uint2-channel-asym", "int4-channel-fzero")


@pytest.mark.parametrize(
    ("case", "scheme"),
    some("sequences", ("int4-channel",), OTHERS)
    + some("tied", ("int8-channel", "uint2-channel-asym"), OTHERS)
    + some("encoder", ("int4-channel-fzero",), OTHERS),
)
def test_recurrent_weights_and_embeddings_do_too(case: str, scheme: str, tmp_path: Path) -> None:
    network, inputs = make(case, scheme)
    write_onnx(network, path := tmp_path / "net.onnx", accuracy_level=0)
    onnx.checker.check_model(str(path), full_check=True)
    assert distance(by_onnxruntime(path, *inputs), simulated(network, *inputs)) < FLOAT_ERROR
    check_the_codes(network, path, scheme)


GROUPS = ("int4-g16", "int2-g16", "uint2-g16-asym", "uint4-g32-fzero", "int3-g8", "uint8-g16-asym")


@pytest.mark.parametrize(
    ("case", "scheme"),
    some("encoder", ("uint2-g16-asym", "int3-g8"), GROUPS) + some("tied", ("int4-g16", "uint4-g32-fzero"), GROUPS),
)
def test_groups_give_what_decoded_weights_give(case: str, scheme: str, tmp_path: Path) -> None:
    network, inputs = make(case, scheme)
    write_onnx(network, path := tmp_path / "net.onnx", accuracy_level=0)
    assert distance(by_onnxruntime(path, *inputs), simulated(network, *inputs)) < FLOAT_ERROR
    check_the_codes(network, path, scheme)


def test_groups_that_are_several_blocks_share_scales_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = quantized(Layers(96), rand(2, 3, 96), "int4-g48", keep=["two"])
    write_onnx(network, path := tmp_path / "net.onnx", accuracy_level=0)
    assert distance(by_onnxruntime(path, rand(5, 3, 96)), simulated(network, rand(5, 3, 96))) < FLOAT_ERROR
    assert operations(path).count("MatMulNBits") == 2
    check_the_codes(network, path, "int4-g48")


STATIC = (
    "w8a8-channel", "w8a8-tensor", "w8a8-channel-asym", "w4a8-channel", "w4a8-channel-asym", "w3a8-channel",
    "w2a8-channel-asym",
)  # fmt: skip


@pytest.mark.parametrize(
    ("case", "scheme"),
    some("residual", ("w8a8-tensor", "w4a8-channel", "w2a8-channel-asym"), STATIC)
    + some("gated", ("w8a8-channel", "w4a8-channel-asym"), STATIC),
)
def test_static_networks_are_integers_throughout(case: str, scheme: str, tmp_path: Path) -> None:
    network, inputs = make(case, scheme)
    report = write_onnx(network, path := tmp_path / "net.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    (found,), (expected,) = by_onnxruntime(path, *inputs), simulated(network, *inputs)
    step = max(network.activations[edge].scale for edge in list(network.activations)[-2:])
    apart = np.abs(found - expected) / step
    assert apart.max() < MOST_CODES
    assert (apart > CODES).mean() < SHARE
    check_the_codes(network, path, scheme)
    assert set(report.forms.values()) == {"integers"}
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Mul", "Sigmoid"} & set(operations(path))


PARTS = ("w8a8-channel", "w4a8-channel-asym")


@pytest.mark.parametrize(
    ("case", "scheme"),
    some("convolutions", ("w4a8-channel-asym",), PARTS)
    + some("layers", ("w8a8-channel",), PARTS)
    + some("encoder", ("w8a8-channel",), PARTS)
    + some("sequences", (), PARTS),
)
def test_static_networks_with_parts_in_float(case: str, scheme: str, tmp_path: Path) -> None:
    network, inputs = make(case, scheme)
    write_onnx(network, path := tmp_path / "net.onnx", accuracy_level=0)
    step = max(parameters.scale for parameters in network.activations.values())
    for found, expected in zip(by_onnxruntime(path, *inputs), simulated(network, *inputs), strict=True):
        assert np.abs(found - expected).max() < CODES * step
    check_the_codes(network, path, scheme)


def test_groups_beside_static_activations_are_computed_in_float(tmp_path: Path) -> None:
    network, inputs = make("encoder", "w4a8-g16")
    report = write_onnx(network, path := tmp_path / "net.onnx")
    assert distance(by_onnxruntime(path, *inputs), simulated(network, *inputs)) < FLOAT_ERROR
    assert report.forms["up"] == "blocks"
    check_the_codes(network, path, "w4a8-g16")


class Around(nn.Module):
    """A value that a linear map reads, behind a dropout, and an addition too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(24, 32), nn.Linear(32, 32), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return h + self.second(self.drop(h))


def test_dynamic_values_are_rounded_for_linear_maps_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x = quantized(Around().eval(), rand(3, 24), "w8a8-channel-dynamic"), rand(5, 24)
    write_onnx(network, tmp_path / "model.onnx")
    assert distance(by_onnxruntime(tmp_path / "model.onnx", x), simulated(network, x)) < FLOAT_ERROR


@pytest.mark.parametrize("scheme", ["w4a8-channel-dynamic", "w8a8-channel-asym-dynamic"])
def test_dynamic_linear_maps_are_fused(scheme: str, tmp_path: Path) -> None:
    network, inputs = make("layers", scheme)
    write_onnx(network, path := tmp_path / "net.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    assert distance(by_onnxruntime(path, *inputs), simulated(network, *inputs)) < FLOAT_ERROR
    assert operations(path).count("DynamicQuantizeMatMul") == 3
    check_the_codes(network, path, scheme)


@pytest.mark.parametrize(
    ("case", "scheme"),
    [
        ("convolutions", "uint4-channel-asym"), ("encoder", "int4-g16"), ("encoder", "int8-channel"),
        pytest.param("sequences", "int2-channel", marks=pytest.mark.slow), ("tied", "uint4-channel-fzero"),
    ],
)  # fmt: skip
def test_portable_files_have_standard_operations_alone(case: str, scheme: str, tmp_path: Path) -> None:
    network, inputs = make(case, scheme)
    write_onnx(network, path := tmp_path / "net.onnx", is_portable=True)
    model = onnx.load(path)
    assert {entry.domain for entry in model.opset_import} == {""}
    # With its fusions ONNX Runtime rounds what linear maps read.
    found = by_onnxruntime(path, *inputs, is_plain=True)
    assert distance(found, simulated(network, *inputs)) < FLOAT_ERROR
    check_the_codes(network, path, scheme, is_portable=True)


def test_the_float_file_is_the_float_network(tmp_path: Path) -> None:
    network, inputs = make("residual", "int8-channel")
    report = write_float_onnx(network.network, path := tmp_path / "net.onnx")
    with torch.no_grad():
        expected = network.network.graph(*inputs).numpy()
    assert distance(by_onnxruntime(path, *inputs), [expected]) < FLOAT_ERROR
    assert report.file_bytes == path.stat().st_size
