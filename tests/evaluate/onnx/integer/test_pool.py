"""Pools over codes against ONNX Runtime: averages in both arithmetics, maxima, every layout and padding."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.onnx.integer.qdq import DTYPES, Array, Graph, assert_equal, random_codes, scales, zeros

Case = tuple[Any, dict[str, Array]]


@st.composite
def global_averages(draw: Any) -> Case:
    dtype, is_last = draw(DTYPES), draw(st.booleans())
    spatial = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    channels = draw(st.integers(1, 40))
    scale_x, scale_y = draw(scales(2))
    graph = Graph()
    edges = [scale_x, draw(zeros(dtype)), scale_y, draw(zeros(dtype))]
    y = graph.integer("QLinearGlobalAveragePool", graph.given("x", dtype), *edges, channels_last=int(is_last))
    return graph.model(y), {
        "x": random_codes(1, (2, *spatial, channels) if is_last else (2, channels, *spatial), dtype)
    }


@st.composite
def pools(draw: Any, op: str) -> Case:
    dtype, rank = draw(DTYPES), draw(st.integers(1, 3))
    is_last = op == "NhwcMaxPool" or (op == "QLinearAveragePool" and draw(st.booleans()))
    kernel, strides = draw(st.tuples(*[st.integers(1, 4)] * rank)), draw(st.tuples(*[st.integers(1, 3)] * rank))
    has_pads = draw(st.booleans())
    pads = [draw(st.integers(0, k - 1)) if has_pads else 0 for k in kernel * 2]
    spatial = [k + draw(st.integers(0, 7)) for k in kernel]
    channels = draw(st.integers(1, 9))
    graph = Graph()
    attributes = dict(kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=draw(st.integers(0, 1)))
    x = graph.given("x", dtype)
    if op == "QLinearAveragePool":
        scale_x, scale_y = draw(scales(2))
        edges = [scale_x, draw(zeros(dtype)), scale_y, draw(zeros(dtype))]
        flags = dict(channels_last=int(is_last), count_include_pad=draw(st.integers(0, 1)))
        y = graph.integer(op, x, *edges, **attributes, **flags)
    else:
        y = graph.integer(op, x, **attributes) if is_last else graph.node(op, x, **attributes)
    return graph.model(y), {
        "x": random_codes(1, (2, *spatial, channels) if is_last else (2, channels, *spatial), dtype)
    }


@settings(deadline=None, max_examples=100)
@given(global_averages())
def test_a_global_average_is_that_of_onnx_runtime(case: Case) -> None:
    assert_equal(*case)


@settings(deadline=None, max_examples=150)
@given(pools("QLinearAveragePool"))
def test_an_average_is_that_of_onnx_runtime(case: Case) -> None:
    assert_equal(*case)


@settings(deadline=None, max_examples=60)
@given(st.one_of(pools("MaxPool"), pools("NhwcMaxPool")))
def test_a_maximum_is_that_of_onnx_runtime(case: Case) -> None:
    assert_equal(*case)


def test_a_dilated_maximum_is_that_of_onnx_runtime() -> None:
    graph = Graph()
    y = graph.node("MaxPool", graph.given("x", np.int8), kernel_shape=[3, 2], dilations=[2, 3], pads=[1, 0, 2, 1])
    assert_equal(graph.model(y), {"x": random_codes(1, (2, 3, 11, 12), np.int8)})


def test_averages_on_ties_are_those_of_onnx_runtime() -> None:
    """Means of 4 codes at equal scales end in .0, .25, .5 and .75; an odd zero point turns the even side around."""
    for zero in (0, 1, 128, 255):
        graph = Graph()
        edges = [np.float32(1), np.uint8(zero)] * 2
        x = graph.given("x", np.uint8)
        y = graph.integer("QLinearAveragePool", x, *edges, kernel_shape=[2, 2], strides=[2, 2])
        z = graph.integer("QLinearGlobalAveragePool", x, *edges)
        assert_equal(graph.model(y, z), {"x": random_codes(zero, (2, 8, 10, 10), np.uint8)})


def test_an_average_of_the_whole_image_is_computed_as_a_global_one() -> None:
    """A float sum in order would round other ties of these scales: about one in twelve."""
    graph = Graph()
    edges = [np.float32(0.1) * np.float32(4), np.uint8(128), np.float32(0.1) * np.float32(2), np.uint8(128)]
    y = graph.integer("QLinearAveragePool", graph.given("x", np.uint8), *edges, kernel_shape=[4, 3])
    assert_equal(graph.model(y), {"x": random_codes(1, (4, 500, 4, 3), np.uint8)})
