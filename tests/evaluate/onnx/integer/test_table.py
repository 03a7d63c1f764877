"""Functions that the runtime tabulates, and softmax, against ONNX Runtime on every code."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.onnx.integer.qdq import DTYPES, Array, Graph, assert_equal, random_codes, scales, zeros


def every_code(dtype: Any) -> Array:
    return np.arange(256).astype(np.uint8).view(dtype)


@settings(deadline=None, max_examples=100)
@given(DTYPES, st.floats(0.003, 1), st.floats(1e-8, 0.01), st.data())
def test_the_logistic_function_is_onnx_runtimes_to_the_last_bit(dtype: Any, x: float, y: float, data: Any) -> None:
    """A small output scale shows bits of the float result that eight of them would hide."""
    graph = Graph()
    edges = [np.float32(x), data.draw(zeros(dtype)), np.float32(y), data.draw(zeros(dtype))]
    model = graph.model(graph.integer("QLinearSigmoid", graph.given("x", dtype), *edges))
    assert_equal(model, {"x": every_code(dtype)})


@settings(deadline=None, max_examples=60)
@given(DTYPES, scales(2), st.sampled_from([0.01, 0.1, 1 / 3, 0.25]), st.data())
def test_a_leaky_relu_is_that_of_onnx_runtime(dtype: Any, scale: Any, alpha: float, data: Any) -> None:
    graph = Graph()
    edges = [scale[0], data.draw(zeros(dtype)), scale[1], data.draw(zeros(dtype))]
    model = graph.model(graph.integer("QLinearLeakyRelu", graph.given("x", dtype), *edges, alpha=alpha))
    assert_equal(model, {"x": every_code(dtype)})


@settings(deadline=None, max_examples=60)
@given(DTYPES, scales(3), st.integers(-2, 1), st.booleans(), st.data())
def test_a_concatenation_is_that_of_onnx_runtime(dtype: Any, scale: Any, axis: int, same: bool, data: Any) -> None:
    graph = Graph()
    zero = [data.draw(zeros(dtype)) for _ in range(3)]
    first = (scale[0], zero[0]) if same else (scale[1], zero[1])
    parts = [graph.given("a", dtype), *first, graph.given("b", dtype), scale[2], zero[2]]
    model = graph.model(graph.integer("QLinearConcat", scale[0], zero[0], *parts, axis=axis))
    assert_equal(model, {"a": every_code(dtype).reshape(16, 16), "b": every_code(dtype)[::-1].reshape(16, 16)})


@settings(deadline=None, max_examples=30)
@given(scales(3), st.data())
def test_a_choice_is_that_of_onnx_runtime(scale: Any, data: Any) -> None:
    graph = Graph()
    zero = [data.draw(zeros(np.uint8)) for _ in range(3)]
    condition = np.random.default_rng(1).integers(0, 2, 256).astype(bool)
    parts = [graph.given("a", np.uint8), scale[0], zero[0], graph.given("b", np.uint8), scale[1], zero[1]]
    model = graph.model(graph.integer("QLinearWhere", condition, *parts, scale[2], zero[2]))
    assert_equal(model, {"a": every_code(np.uint8), "b": every_code(np.uint8)[::-1]})


@settings(deadline=None, max_examples=100)
@given(DTYPES, st.floats(1e-3, 3), st.integers(1, 600), st.integers(-3, 2), st.sampled_from([11, 13]), st.data())
def test_a_softmax_is_that_of_onnx_runtime(
    dtype: Any, scale: float, steps: int, axis: int, opset: int, data: Any
) -> None:
    x = random_codes(data.draw(st.integers(0, 9)), (3, data.draw(st.integers(1, 40)), 5), dtype)
    model = _softmax(dtype, scale, steps, axis, opset, data)
    assert_equal(model, {"x": x})


@settings(deadline=None, max_examples=60)
@given(DTYPES, st.floats(1e-3, 3), st.integers(1, 8), st.integers(0, 100), st.data())
def test_a_softmax_of_equal_codes_rounds_ties_as_onnx_runtime(
    dtype: Any, scale: float, n: int, odd: int, data: Any
) -> None:
    """2n equal codes and n(2k + 1) steps: every result is k + 1/2 up to the noise of the float sum."""
    x = np.full((4, 2 * n), random_codes(odd, (4, 1), dtype))
    assert_equal(_softmax(dtype, scale, n * (2 * odd + 1), -1, 13, data), {"x": x})


def _softmax(dtype: Any, scale: float, steps: int, axis: int, opset: int, data: Any) -> Any:
    """`steps` is what the runtime makes of the output's scale, 1 / (steps + 0.3)."""
    graph = Graph()
    edges = [np.float32(scale), data.draw(zeros(dtype)), np.float32(1 / (steps + 0.3)), data.draw(zeros(dtype))]
    return graph.model(graph.integer("QLinearSoftmax", graph.given("x", dtype), *edges, axis=axis, opset=opset))
