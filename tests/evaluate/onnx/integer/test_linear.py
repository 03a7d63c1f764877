"""QGemm, QLinearMatMul and MatMulIntegerToFloat against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
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

SIZES = st.integers(1, 70)
Case = tuple[Any, dict[str, Array]]


@st.composite
def products(draw: Any, op: str) -> Case:
    dtype = np.uint8 if op == "MatMulIntegerToFloat" else draw(DTYPES)
    weight_dtype = np.int8 if dtype is np.int8 else draw(DTYPES)
    m, k, n = draw(SIZES), draw(SIZES), draw(SIZES)
    count = draw(st.sampled_from([1, n]))
    scale_a, spread, *scale_b = draw(scales(2 + count))
    scale_b = np.array(scale_b, np.float32) if count > 1 else np.float32(scale_b[0])
    zero_b = np.full(np.shape(scale_b), draw(st.one_of(st.just(weight_dtype(0)), zeros(weight_dtype))), weight_dtype)
    scale_y = np.float32(scale_a * np.max(scale_b) * draw(st.sampled_from([2, 6, 100, 3000])) * spread)
    a, b = (
        random_codes(draw(st.integers(0, 9)), (m, k), dtype),
        random_codes(draw(st.integers(0, 9)), (k, n), weight_dtype),
    )
    graph = Graph()
    x, zero_a, result = graph.given("a", dtype), draw(zeros(dtype)), (scale_y, draw(zeros(dtype)))
    if op == "QGemm":
        flags = dict(
            transA=draw(st.integers(0, 1)), transB=draw(st.integers(0, 1)), alpha=draw(st.sampled_from([1.0, 0.3]))
        )
        a, b = a.T if flags["transA"] else a, b.T if flags["transB"] else b
        bias = draw(st.sampled_from(["", random_codes(3, n, np.int32) >> 16]))
        tail = result if draw(st.booleans()) else ()
        y = graph.integer(op, x, scale_a, zero_a, b.copy(), scale_b, zero_b, bias, *tail, **flags)
    elif op == "QLinearMatMul":
        a = np.stack([a, a[::-1]]) if draw(st.booleans()) else a
        y = graph.node(op, x, scale_a, zero_a, b, scale_b, zero_b, *result)
    else:
        bias = [np.random.default_rng(1).normal(size=n).astype(np.float32)] if draw(st.booleans()) else []
        y = graph.integer(op, x, b, scale_a, scale_b, zero_a, zero_b, *bias)
    return graph.model(y), {"a": a.copy()}


@settings(deadline=None, max_examples=100)
@given(products("QGemm"))
def test_a_linear_layer_is_that_of_onnx_runtime(case: Case) -> None:
    assert_equal(*case)


@settings(deadline=None, max_examples=60)
@given(products("QLinearMatMul"))
def test_a_product_of_codes_is_that_of_onnx_runtime(case: Case) -> None:
    assert_equal(*case)


@settings(deadline=None, max_examples=60)
@given(products("MatMulIntegerToFloat"))
def test_a_product_that_stays_float_is_that_of_onnx_runtime(case: Case) -> None:
    assert_equal(*case)


def test_a_product_of_two_activations_is_that_of_onnx_runtime() -> None:
    graph = Graph()
    a, b = random_codes(1, (2, 3, 5, 8), np.uint8), random_codes(2, (2, 3, 8, 6), np.uint8)
    given_a, given_b = graph.given("a", np.uint8), graph.given("b", np.uint8)
    scale, zero = np.float32(0.02), np.uint8(130)
    y = graph.node("QLinearMatMul", given_a, scale, zero, given_b, scale, zero, np.float32(0.03), zero)
    assert_equal(graph.model(y), {"a": a, "b": b})


@pytest.mark.parametrize("op", ["QGemm", "QLinearMatMul"])
def test_multipliers_are_rounded_in_the_runtimes_order(op: str) -> None:
    scale_a, scale_y, zero = np.float32(0.1), np.float32(0.7), np.uint8(128)
    b, scale_b, zero_b = np.ones((1, 200), np.int8), scales_near_ties(scale_a, scale_y, 200), np.zeros(200, np.int8)
    graph = Graph()
    inputs = [graph.given("a", np.uint8), scale_a, zero, b, scale_b, zero_b]
    y = graph.integer(op, *inputs, "", scale_y, zero) if op == "QGemm" else graph.node(op, *inputs, scale_y, zero)
    assert_equal(graph.model(y), {"a": np.arange(256, dtype=np.uint8)[:, None]})
