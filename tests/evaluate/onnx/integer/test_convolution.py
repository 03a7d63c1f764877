"""QLinearConv against ONNX Runtime: 1-D to 3-D, groups, strides, dilations, padding, zero points, ties, saturation."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluate.onnx.integer.qdq import (
    DTYPES,
    Array,
    Graph,
    assert_equal,
    random_codes,
    scales,
    scales_near_ties,
    zeros,
)


@st.composite
def convolutions(draw: Any) -> tuple[Any, dict[str, Array]]:
    dtype = draw(DTYPES)
    weight_dtype = np.int8 if dtype is np.int8 else draw(DTYPES)
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    per_group = st.sampled_from([1, 3, 10])
    channels, outputs = groups * draw(per_group), groups * draw(per_group)
    kernel, strides, dilations = (draw(st.tuples(*[st.integers(1, top)] * rank)) for top in (4, 3, 2))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = [draw(st.integers(0, r)) for r in reach * 2]
    spatial = [draw(st.integers(r, r + 4)) for r in reach]
    is_last = draw(st.booleans())
    shape = (2, *spatial, channels) if is_last else (2, channels, *spatial)
    x = random_codes(draw(st.integers(0, 9)), shape, dtype)
    w = random_codes(draw(st.integers(0, 9)), (outputs, channels // groups, *kernel), weight_dtype)
    count = draw(st.sampled_from([1, outputs]))
    scale_x, spread, *scale_w = draw(scales(2 + count))
    scale_w = np.array(scale_w, np.float32) * draw(st.sampled_from([1, 1, -1]))
    zero_w = np.full(count, draw(st.one_of(st.just(weight_dtype(0)), zeros(weight_dtype))))
    # From "every sum saturates" to "every sum is beside a small multiple of one half".
    scale_y = np.float32(scale_x * scale_w[0] * draw(st.sampled_from([2, 6, 100, 3000])) * spread)
    inputs = [scale_x, draw(zeros(dtype)), w, scale_w, zero_w, np.abs(scale_y), draw(zeros(dtype))]
    if draw(st.booleans()):
        inputs.append(random_codes(1, outputs, np.int32) >> draw(st.integers(0, 24)))
    graph = Graph()
    attributes = dict(kernel_shape=kernel, strides=strides, dilations=dilations, pads=pads, group=groups)
    if is_last:
        y = graph.integer("QLinearConv", graph.given("x", dtype), *inputs, channels_last=1, **attributes)
    else:
        y = graph.node("QLinearConv", graph.given("x", dtype), *inputs, **attributes)
    return graph.model(y), {"x": x}


@settings(deadline=None, max_examples=80)
@given(convolutions())
def test_a_convolution_is_that_of_onnx_runtime(case: tuple[Any, dict[str, Array]]) -> None:
    assert_equal(*case)


def test_every_sum_on_a_tie_is_rounded_to_even() -> None:
    """Sums k and multiplier 1/2: half of the outputs are ties, at both signs."""
    graph = Graph()
    x = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    half, one, zero = np.float32(0.5), np.float32(1), np.uint8(128)
    w = np.ones((1, 1, 1, 1), np.int8)
    y = graph.node(
        "QLinearConv", graph.given("x", np.uint8), half, zero, w, one, np.int8(0), one, zero, kernel_shape=[1, 1]
    )
    agreement = assert_equal(graph.model(y), {"x": x})
    assert agreement.elements == 256


def test_multipliers_are_rounded_in_the_runtimes_order() -> None:
    graph = Graph()
    x = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    scale_x, scale_y, zero = np.float32(0.1), np.float32(0.7), np.uint8(128)
    w, scale_w = np.ones((200, 1, 1, 1), np.int8), scales_near_ties(scale_x, scale_y, 200)
    inputs = [scale_x, zero, w, scale_w, np.zeros(200, np.int8), scale_y, zero]
    assert_equal(graph.model(graph.node("QLinearConv", graph.given("x", np.uint8), *inputs)), {"x": x})


def test_sums_beyond_24_bits_and_beyond_int32_are_those_of_onnx_runtime() -> None:
    graph = Graph()
    channels = 2000
    x, w = random_codes(1, (1, channels, 4, 4), np.uint8), random_codes(2, (7, channels, 3, 3), np.int8)
    w[0], w[1] = 127, -128
    bias = np.array([2**31 - 1, -(2**31), 2**30, 3, 2, 1, 0], np.int32)
    tail = [np.int8(0), np.float32(2**17), np.uint8(100), bias]
    y = graph.node("QLinearConv", graph.given("x", np.uint8), np.float32(1), np.uint8(0), w, np.float32(1), *tail)
    assert_equal(graph.model(y), {"x": x})


def test_padding_that_is_chosen_by_the_runtime() -> None:
    for auto_pad in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        graph = Graph()
        x, w = random_codes(1, (2, 3, 8, 9), np.uint8), random_codes(2, (4, 3, 4, 3), np.int8)
        inputs = [np.float32(1), np.uint8(9), w, np.float32(1), np.int8(0), np.float32(300), np.uint8(100)]
        y = graph.node("QLinearConv", graph.given("x", np.uint8), *inputs, auto_pad=auto_pad, strides=[2, 1])
        assert_equal(graph.model(y), {"x": x})
