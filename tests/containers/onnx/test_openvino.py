"""OpenVINO reads the files that are written for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pennyweight.containers.onnx import write_onnx
from tests.containers.onnx.quantizing import IGNORED, by_onnxruntime, by_openvino, distance, simulated
from tests.containers.onnx.test_write import CODES, FLOAT_ERROR, MOST_CODES, SHARE, check_the_codes, make, some

pytestmark = pytest.mark.filterwarnings(IGNORED)

WEIGHTS = ("int8-channel", "int4-channel", "uint2-channel-asym", "uint4-channel-fzero", "int8-tensor")
GROUPS = ("int4-g16", "uint4-g32-asym", "uint2-g16-asym", "int3-g16", "uint4-g16-fzero")


@pytest.mark.parametrize(
    ("case", "scheme"),
    some("convolutions", ("int4-channel",), WEIGHTS)
    + some("sequences", (), WEIGHTS)
    + some("layers", ("uint2-channel-asym",), WEIGHTS)
    + some("tied", ("int8-channel",), (*WEIGHTS, *GROUPS))
    + some("encoder", ("uint2-g16-asym", "uint4-g32-asym"), (*WEIGHTS, *GROUPS)),
)
def test_weights_alone(case: str, scheme: str, tmp_path: Path) -> None:
    network, inputs = make(case, scheme)
    write_onnx(network, path := tmp_path / "net.onnx", runtime="openvino", accuracy_level=0)
    assert distance(by_openvino(path, *inputs), simulated(network, *inputs)) < FLOAT_ERROR
    # ONNX Runtime reads them too, if more slowly.
    assert distance(by_onnxruntime(path, *inputs, is_plain=True), simulated(network, *inputs)) < FLOAT_ERROR
    check_the_codes(network, path, scheme, runtime="openvino")


@pytest.mark.parametrize(("case", "scheme"), some("gated", ("w4a8-channel",), ("w8a8-channel", "w8a8-channel-asym")))
def test_static_networks(case: str, scheme: str, tmp_path: Path) -> None:
    network, inputs = make(case, scheme)
    write_onnx(network, path := tmp_path / "net.onnx", runtime="openvino")
    (found,), (expected,) = by_openvino(path, *inputs), simulated(network, *inputs)
    apart = np.abs(found - expected) / list(network.activations.values())[-1].scale
    assert apart.max() < MOST_CODES
    assert (apart > CODES).mean() < SHARE
    check_the_codes(network, path, scheme, runtime="openvino")


def test_dynamic_linear_maps(tmp_path: Path) -> None:
    network, inputs = make("layers", "w8a8-channel-dynamic")
    write_onnx(network, path := tmp_path / "net.onnx", runtime="openvino")
    assert distance(by_openvino(path, *inputs), simulated(network, *inputs)) < FLOAT_ERROR
