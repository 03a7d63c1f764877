"""QuantizeLinear, DequantizeLinear and what only moves values, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.onnx.integer.qdq import DTYPES, Graph, assert_equal, random_codes, scales, zeros

HOSTILE = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, -0.0]
INDEX = np.int64


@settings(deadline=None, max_examples=60)
@given(DTYPES, scales(1), st.integers(1, 70), st.data())
def test_codes_of_floats_are_those_of_onnx_runtime(dtype: Any, scale: Any, length: int, data: Any) -> None:
    steps = np.random.default_rng(length).integers(-600, 600, length)
    x = np.concatenate([np.float32(0.5) * steps.astype(np.float32) * scale[0], np.array(HOSTILE, np.float32)])
    zero = data.draw(zeros(dtype))
    graph = Graph()
    codes = graph.node("QuantizeLinear", graph.given("x"), scale[0], zero)
    floats = graph.node("DequantizeLinear", codes, scale[0], zero)
    assert_equal(graph.model(codes, floats), {"x": x})


def test_a_scale_for_each_channel_is_taken_along_its_axis() -> None:
    graph = Graph()
    scale, zero = np.array([0.1, 0.2, 0.3], np.float32), np.array([1, 2, 250], np.uint8)
    codes = graph.node("QuantizeLinear", graph.given("x"), scale, zero, axis=1)
    floats = graph.node("DequantizeLinear", codes, scale, zero, axis=1)
    x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32) * 5
    assert_equal(graph.model(codes, floats), {"x": x})


MOVES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Reshape": ([np.array([0, -1], INDEX)], {}),
    "Flatten": ([], {"axis": 2}),
    "Squeeze": ([np.array([1], INDEX)], {}),
    "Unsqueeze": ([np.array([0, 5], INDEX)], {}),
    "Transpose": ([], {"perm": [2, 0, 3, 1]}),
    "Pad": ([np.array([0, 0, 1, 2, 0, 0, 3, 0], INDEX), np.uint8(7)], {}),
    "Slice": ([np.array([-3], INDEX), np.array([2**31], INDEX), np.array([2], INDEX), np.array([2], INDEX)], {}),
    "Gather": ([np.array([[2, 0], [-1, 1]], INDEX)], {"axis": 2}),
}


@pytest.mark.parametrize("op", MOVES)
def test_codes_are_moved_as_onnx_runtime_moves_them(op: str) -> None:
    inputs, attributes = MOVES[op]
    graph = Graph()
    y = graph.node(op, graph.given("x", np.uint8), *inputs, **attributes)
    assert_equal(graph.model(y), {"x": random_codes(1, (2, 1, 5, 6), np.uint8)})


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
def test_single_float_operations_are_exact(op: str) -> None:
    graph = Graph()
    model = graph.model(graph.node(op, graph.given("a"), graph.given("b")))
    a, b = np.random.default_rng(1).normal(size=(2, 3, 70)).astype(np.float32)
    assert_equal(model, {"a": a, "b": b})


def test_a_clipped_float_is_exact() -> None:
    graph = Graph()
    y = graph.node("Clip", graph.node("Relu", graph.given("x")), np.float32(0.1), np.float32(0.7))
    assert_equal(graph.model(y), {"x": np.random.default_rng(1).normal(size=(3, 70)).astype(np.float32)})


def test_parts_of_codes_are_those_of_onnx_runtime() -> None:
    x = random_codes(1, (2, 7, 3), np.uint8)
    for sizes in ([3, 4], [1, 6]):
        graph = Graph()
        parts = graph.nodes("Split", graph.given("x", np.uint8), np.array(sizes, INDEX), count=2, axis=1)
        assert_equal(graph.model(*parts), {"x": x})
