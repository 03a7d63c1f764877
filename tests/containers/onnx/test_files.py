"""The files themselves."""

from __future__ import annotations

import logging
import resource
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from pennyweight.containers.onnx import read_onnx, write_float_onnx, write_onnx
from pennyweight.core.errors import ContainerError
from pennyweight.models.network import QuantizedNetwork
from pennyweight.plan.plan import Plan
from tests.containers.onnx.networks import Layers, Residual
from tests.containers.onnx.quantizing import IGNORED, by_onnxruntime, distance, quantized, simulated

pytestmark = pytest.mark.filterwarnings(IGNORED)

FLOAT_ERROR = 5e-6
# Half a step of a bias, s_x s_w, beside products of integers.
BIAS_ERROR = 1e-4
X = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))


def layers(scheme: str = "int4-channel") -> QuantizedNetwork:
    torch.manual_seed(0)
    return quantized(Layers(), X, scheme)


def test_large_tensors_lie_in_a_file_beside(tmp_path: Path) -> None:
    network = layers()
    report = write_onnx(network, path := tmp_path / "net.onnx", external_bytes=1000, accuracy_level=0)
    beside = tmp_path / "net.onnx.data"
    assert sorted(tmp_path.iterdir()) == [path, beside]
    assert report.file_bytes == path.stat().st_size + beside.stat().st_size
    onnx.checker.check_model(str(path))
    assert distance(by_onnxruntime(path, X), simulated(network, X)) < FLOAT_ERROR
    assert torch.equal(read_onnx(path)["one"].codes, network.weights["one"].codes)


@pytest.mark.parametrize("external", [100, 1 << 40])
def test_a_full_disk_leaves_what_was_there(external: int, tmp_path: Path) -> None:
    network = layers()
    path = tmp_path / "net.onnx"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_onnx(network, path, external_bytes=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="missing is no directory: make it first"):
        write_onnx(layers(), tmp_path / "missing" / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_said_and_the_log_is_as_loud_as_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    network = layers()
    level = logging.getLogger("torch.onnx").level
    recwarn.clear()
    capfd.readouterr()
    write_onnx(network, tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch.onnx").level == level


@pytest.mark.parametrize(
    ("scheme", "opset", "ir_version", "domains"),
    [
        ("w8a8-channel", 18, 8, {""}),
        ("w4a8-channel", 21, 10, {""}),
        ("w2a8-channel", 25, 13, {""}),
        ("int4-channel", 18, 8, {"", "com.microsoft"}),
    ],
)
def test_the_opset_is_the_lowest_that_has_what_is_needed(
    scheme: str, opset: int, ir_version: int, domains: set[str], tmp_path: Path
) -> None:
    report = write_onnx(layers(scheme), path := tmp_path / "net.onnx")
    model = onnx.load(path)
    assert report.opset == opset
    assert model.ir_version == ir_version
    assert {entry.domain: entry.version for entry in model.opset_import} == dict.fromkeys(domains, 1) | {"": opset}
    assert model.producer_name == "pennyweight"


def test_weights_take_the_bits_that_they_have(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {}
    for scheme in ("int8-channel", "int4-channel", "int2-channel"):
        network = quantized(nn.Sequential(nn.Conv2d(64, 64, 3)), torch.randn(1, 64, 8, 8), scheme)
        sizes[scheme] = write_onnx(network, tmp_path / "net.onnx").file_bytes
    weights = 64 * 64 * 9
    assert sizes["int8-channel"] - sizes["int4-channel"] == pytest.approx(weights / 2, abs=100)
    assert sizes["int4-channel"] - sizes["int2-channel"] == pytest.approx(weights / 4, abs=100)


class Named(nn.Module):
    """Parameters whose names are those that the writer gives to its own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Module()
        self.x.scale = nn.Parameter(torch.tensor([2.0]))
        self.x.zero = nn.Parameter(torch.tensor([1.0]))
        self.lin = nn.Linear(4, 4)
        self.lin.codes = nn.Parameter(torch.randn(4))
        self.linear = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.x.scale + self.x.zero + self.lin.codes + self.linear


@pytest.mark.parametrize("scheme", ["w8a8-channel", "int8-channel"])
def test_names_that_are_taken_are_told_apart(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    network = quantized(Named(), x, scheme)
    write_onnx(network, path := tmp_path / "net.onnx", accuracy_level=0)
    onnx.checker.check_model(str(path), full_check=True)
    assert distance(by_onnxruntime(path, x), simulated(network, x)) < BIAS_ERROR
    (weight,) = read_onnx(path).values()
    (given,) = network.weights.values()
    assert torch.equal(weight.codes, given.codes)


class Several(nn.Module):
    """Inputs by name, and outputs of which one is an input of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        half = self.one(left).relu()
        return {"half": half, "whole": self.two(half) + right}


def test_inputs_and_outputs_have_the_names_of_their_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {"left": torch.randn(2, 4), "right": torch.randn(2, 4)}
    network = quantized_by_name(Several(), given)
    write_onnx(network, path := tmp_path / "net.onnx")
    graph = onnx.load(path).graph
    assert [entry.name for entry in graph.input] == ["left", "right"]
    assert [entry.name for entry in graph.output] == ["relu", "add"]
    assert [entry.name for entry in onnx.load(path).graph.output] == ["relu", "add"]
    with torch.no_grad():
        expected = network.simulated()(**given)
    found = by_onnxruntime(path, given["left"], given["right"])
    assert distance(found, [expected["half"].numpy(), expected["whole"].numpy()]) < 0.02


def quantized_by_name(net: nn.Module, example: dict[str, Tensor]) -> QuantizedNetwork:
    return quantized(net, example, "int8-channel")


def test_a_float_file_and_anothers_have_no_codes(tmp_path: Path) -> None:
    write_float_onnx(layers().network, tmp_path / "net.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    for name in ("net.onnx", "text.onnx"):
        with pytest.raises(ContainerError, match="not an ONNX file that Pennyweight wrote"):
            read_onnx(tmp_path / name)


def test_what_the_file_cannot_hold_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = quantized(Residual(), torch.randn(2, 3, 8, 8), "w8a8-channel")
    path = tmp_path / "net.onnx"
    with pytest.raises(ContainerError, match="head: ONNX files hold integers, not nf4"):
        write_onnx(quantized(Residual(), torch.randn(2, 3, 8, 8), "nf4-channel", keep=["stem", "one", "two"]), path)
    with pytest.raises(ContainerError, match="edge relu: has no scale and zero point: calibrate it"):
        write_onnx(replace(network, activations={k: v for k, v in network.activations.items() if k != "relu"}), path)
    edges = {**network.plan.edges, "relu_9": network.plan.edges["relu"]}
    with pytest.raises(ContainerError, match="edge relu_9: no value of the network has this name"):
        write_onnx(replace(network, plan=Plan(network.plan.schemes, edges=edges)), path)
    assert not path.exists()


class Unwritable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigh(self.lin(x))[0]


def test_an_operation_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = quantized(Unwritable(), torch.randn(2, 3, 3), "int8-channel")
    with pytest.raises(ContainerError, match="eigh"):
        write_onnx(network, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
