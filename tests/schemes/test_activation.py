"""Activation codes are those of ONNX Runtime's QuantizeLinear and DynamicQuantizeLinear, bit for bit."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.core.errors import UsageError
from pennyweight.formats.integer import Int
from pennyweight.models.network.quantized import dynamic_parameters
from pennyweight.schemes.activation import (
    UINT8,
    ActivationParameters,
    ActivationScheme,
    parse_network_scheme,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

INT8 = Int(8)
TYPES: dict[str, Any] = {"uint8": np.uint8, "int8": np.int8}
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
hostile = st.one_of(
    finite,
    st.sampled_from(
        [0.0, -0.0, 1e-45, -1e-45, 1.17549435e-38, 3.4028235e38, -3.4028235e38, 0.5, 1.5, 2.5, -0.5, 127.5]
    ),
)
scales = st.one_of(
    st.sampled_from([1.0, 0.5, 0.1, 1 / 255, 3.0, 2.0**-126, 2.0**-20, 1e30]),
    st.floats(min_value=2.0**-120, max_value=2.0**120, width=32),
)


def is_far_from_overflow(x: float) -> bool:
    return abs(x) < 1e38


def session(graph: Any) -> Any:
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def quantizer(kind: str) -> Any:
    helper, types = onnx.helper, onnx.TensorProto
    code = types.UINT8 if kind == "uint8" else types.INT8
    floats, codes = [("x", ["n"]), ("scale", [])], [("zero", [])]
    inputs = [helper.make_tensor_value_info(name, types.FLOAT, shape) for name, shape in floats]
    inputs += [helper.make_tensor_value_info(name, code, shape) for name, shape in codes]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    outputs = [
        helper.make_tensor_value_info("codes", code, ["n"]),
        helper.make_tensor_value_info("y", types.FLOAT, ["n"]),
    ]
    return session(helper.make_graph(nodes, "round", inputs, outputs))


@functools.cache
def dynamic_quantizer() -> Any:
    helper, types = onnx.helper, onnx.TensorProto
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"])
    outputs = [
        helper.make_tensor_value_info("codes", types.UINT8, ["n"]),
        helper.make_tensor_value_info("scale", types.FLOAT, []),
        helper.make_tensor_value_info("zero", types.UINT8, []),
    ]
    return session(
        helper.make_graph([node], "dynamic", [helper.make_tensor_value_info("x", types.FLOAT, ["n"])], outputs)
    )


@pytest.mark.parametrize("element", [UINT8, INT8], ids=lambda element: element.name)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_codes_are_those_of_quantize_linear(element: Int, data: st.DataObject) -> None:
    scale = float(np.float32(data.draw(scales)))
    zero = data.draw(st.integers(int(element.smallest), int(element.largest)))
    numbers = data.draw(st.lists(hostile, min_size=1, max_size=40))
    # Ties, and the numbers beside them.
    steps = data.draw(st.lists(st.integers(-300, 300), max_size=20))
    with np.errstate(over="ignore"):
        ties = [float(np.float32((step + 0.5) * scale)) for step in steps]
    numbers += [tie for tie in ties if math.isfinite(tie)]
    x = np.array(numbers, dtype=np.float32)
    with np.errstate(over="ignore"):
        x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
    x = x[np.isfinite(x)]
    given_ = {"x": x, "scale": np.array(scale, np.float32), "zero": np.array(zero, TYPES[element.name])}
    codes, y = quantizer(element.name).run(None, given_)
    parameters = ActivationParameters(scale, zero, element)
    assert np.array_equal(parameters.values(torch.from_numpy(x)).numpy(), codes.astype(np.float32))
    assert np.array_equal(parameters.codes(torch.from_numpy(x)).numpy(), codes.astype(np.int32) - int(element.smallest))
    assert np.array_equal(parameters.round_trip(torch.from_numpy(x)).numpy(), y)


@settings(max_examples=150, deadline=None)
@given(st.lists(hostile, min_size=1, max_size=40))
def test_dynamic_parameters_are_those_of_dynamic_quantize_linear(numbers: list[float]) -> None:
    x = np.array(numbers, dtype=np.float32)
    codes, scale, zero = dynamic_quantizer().run(None, {"x": x})
    found = dynamic_parameters(torch.from_numpy(x), UINT8)
    if scale == 0:
        # A range of denormal numbers: the runtime divides by 0, and reads zeros whatever comes of it, as we do.
        assert not found.round_trip(torch.from_numpy(x)).any()
        return
    if not math.isfinite(scale):
        # The range is beyond float32.
        return
    assert (found.scale, found.zero) == (float(scale), int(zero))
    assert np.array_equal(found.codes(torch.from_numpy(x)).numpy(), codes)


@settings(max_examples=150, deadline=None)
@given(
    low=hostile.filter(is_far_from_overflow),
    high=hostile.filter(is_far_from_overflow),
    is_symmetric=st.booleans(),
    bits=st.sampled_from([4, 8]),
    signed=st.booleans(),
)
def test_a_range_is_covered_and_holds_zero(
    low: float, high: float, is_symmetric: bool, bits: int, signed: bool
) -> None:
    low, high = min(low, high), max(low, high)
    found = ActivationScheme(Int(bits, signed=signed), is_symmetric=is_symmetric).parameters(low, high)
    assert found.scale > 0
    assert math.isfinite(found.scale)
    assert np.float32(found.scale) == found.scale
    assert found.element.smallest <= found.zero <= found.element.largest
    assert float(found.round_trip(torch.zeros(1))) == 0.0
    # The ends are read at most half a step, and its rounding, beside themselves.
    for end in (min(low, 0.0), max(high, 0.0)):
        assert abs(float(found.round_trip(torch.tensor([end]))) - end) <= found.scale * (0.5 + 2**-14)


def test_exact_parameters() -> None:
    scheme = ActivationScheme()
    assert scheme.parameters(0.0, 255.0) == ActivationParameters(1.0, 0, UINT8)
    assert scheme.parameters(-128.0, 127.0) == ActivationParameters(1.0, 128, UINT8)
    # A range that does not hold 0 is widened.
    assert scheme.parameters(51.0, 255.0) == ActivationParameters(1.0, 0, UINT8)
    assert scheme.parameters(-255.0, -51.0) == ActivationParameters(1.0, 255, UINT8)
    # smallest - low / scale = 0.5 is a tie: to the even zero point.
    assert scheme.parameters(-0.5, 254.5).zero == 0
    assert scheme.parameters(-1.5, 253.5).zero == 2
    assert scheme.parameters(0.0, 0.0) == ActivationParameters(1.0, 0, UINT8)
    symmetric = ActivationScheme(Int(8), is_symmetric=True)
    assert symmetric.parameters(-128.0, 5.0) == ActivationParameters(1.0, 0, Int(8))
    assert symmetric.parameters(-5.0, 127.0) == ActivationParameters(1.0, 0, Int(8))
    assert ActivationScheme(is_symmetric=True).parameters(-128.0, 5.0) == ActivationParameters(1.0, 128, UINT8)
    assert (scheme.parameters(-128.0, 127.0).low, scheme.parameters(-128.0, 127.0).high) == (-128.0, 127.0)


@pytest.mark.parametrize("ends", [(0.0, math.inf), (-math.inf, 0.0), (0.0, math.nan), (math.nan, 1.0)])
def test_ends_that_are_no_numbers_are_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="finite"):
        ActivationScheme().parameters(*ends)


NAMES = [
    "w8a8-channel", "w4a8-channel", "w8a8-tensor", "w4a8-g32", "w4a4-channel", "w3a8-channel-asym",
    "w8a8-channel-dynamic", "w4a8-g128-asym-dynamic", "int4-channel-f32", "int8-channel-f32", "int4-g32-f32",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_network_schemes_are_read_back(name: str) -> None:
    scheme = parse_network_scheme(name)
    assert scheme.name == name
    assert parse_network_scheme(scheme.name) == scheme
    assert (scheme.activation is None) == name.startswith("int")
    if scheme.activation is not None:
        assert scheme.activation.is_dynamic == name.endswith("dynamic")
        assert (scheme.weight.zero is not None) == ("asym" in name)


def test_names_of_activation_schemes() -> None:
    assert ActivationScheme().name == "uint8"
    assert ActivationScheme(Int(8), is_symmetric=True).name == "int8-sym"
    assert ActivationScheme(is_dynamic=True).name == "uint8-dynamic"


@pytest.mark.parametrize(
    "name", ["w9a8-channel", "w4a16-channel", "w4a8", "w4a8-g0", "w4a8-channel-sym", "a8w8-channel", ""]
)
def test_other_names_are_refused_with_examples(name: str) -> None:
    with pytest.raises(UsageError, match="w8a8-channel, w4a8-channel"):
        parse_network_scheme(name)
