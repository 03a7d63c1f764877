"""QLinearAdd and QLinearMul against ONNX Runtime: all pairs of codes, all lengths around its vectors, broadcasting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.evaluate.onnx.integer.elementwise import is_exchanged
from pennyweight.evaluate.onnx.integer.simulate import simulate
from tests.evaluate.onnx.integer.qdq import DTYPES, Array, Graph, assert_equal, random_codes, scales, zeros

OPS = st.sampled_from(["QLinearAdd", "QLinearMul"])
SHAPES = [
    ((7,), ()), ((), (7,)), ((1,), (7,)), ((7,), (1,)), ((), ()), ((1, 1), (1, 1)), ((1, 1), (5, 1)), ((2, 3, 1), (1,)),
    ((2, 3, 1), (3, 1)), ((3, 9), (3, 1)), ((3, 1), (3, 9)), ((2, 1, 9), (1, 3, 1)), ((2, 9), (9,)),
    ((2, 4, 5, 5), (4, 1, 1)), ((4, 1, 1), (2, 4, 5, 5)),
]  # fmt: skip


@st.composite
def models(draw: Any) -> tuple[Any, Any]:
    """(model of inputs a and b, type of its codes), with scales that put sums on ties."""
    op, dtype = draw(OPS), draw(DTYPES)
    scale_a, scale_b, scale_c = draw(scales(3))
    if op == "QLinearMul":
        scale_c = np.float32(scale_a * scale_b * draw(st.sampled_from([1, 3, 16, 100, 1e-8])))
    graph = Graph()
    a = (graph.given("a", dtype), scale_a, draw(zeros(dtype)))
    b = (graph.given("b", dtype), scale_b, draw(zeros(dtype)))
    return graph.model(graph.integer(op, *a, *b, scale_c, draw(zeros(dtype)))), dtype


def pairs(dtype: Any) -> dict[str, Array]:
    codes = np.arange(256).astype(np.uint8).view(dtype)
    a, b = np.meshgrid(codes, codes)
    return {"a": a.ravel(), "b": b.ravel()}


@settings(deadline=None, max_examples=40)
@given(models())
def test_every_pair_of_codes_gives_onnx_runtimes_code(case: tuple[Any, Any]) -> None:
    model, dtype = case
    assert_equal(model, pairs(dtype))


@settings(deadline=None, max_examples=70)
@given(models(), st.integers(1, 70))
def test_every_length_gives_onnx_runtimes_codes(case: tuple[Any, Any], length: int) -> None:
    model, dtype = case
    assert_equal(model, {"a": random_codes(1, length, dtype), "b": random_codes(2, length, dtype)})


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@settings(deadline=None, max_examples=6)
@given(case=models())
def test_broadcast_operands_give_onnx_runtimes_codes(shapes: Any, case: tuple[Any, Any]) -> None:
    model, dtype = case
    assert_equal(model, {"a": random_codes(1, shapes[0], dtype), "b": random_codes(2, shapes[1], dtype)})


def test_the_order_of_operands_matters_in_the_last_bit() -> None:
    """The reason for following the runtime's exchange of operands: the sum isn't commutative."""
    assert is_exchanged((3, 1), (3, 9))
    assert not is_exchanged((3, 9), (3, 1))
    tenth, zero = np.float32(0.1), np.uint8(128)
    first, second, total = (np.float32(tenth * np.float32(times)) for times in (5, 7, 6))
    codes = []
    for a, b in (("a", "b"), ("b", "a")):
        graph = Graph()
        operands = {"a": (graph.given("a", np.uint8), first, zero), "b": (graph.given("b", np.uint8), second, zero)}
        model = graph.model(graph.integer("QLinearAdd", *operands[a], *operands[b], total, zero))
        assert_equal(model, pairs(np.uint8))
        codes.append(next(iter(simulate(model, pairs(np.uint8)).values())))
    assert (codes[0] != codes[1]).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_more_codes_than_pairs_are_looked_up_with_the_same_result(dtype: Any) -> None:
    graph = Graph()
    scale, zero = np.float32(0.1), dtype(3)
    a, b = (graph.given("a", dtype), scale, zero), (graph.given("b", dtype), np.float32(0.07), zero)
    results = [graph.integer(op, *a, *b, np.float32(0.06), zero) for op in ("QLinearAdd", "QLinearMul")]
    model = graph.model(*results)
    assert_equal(model, {"a": random_codes(1, (5, 3, 100, 100), dtype), "b": random_codes(2, (5, 3, 100, 100), dtype)})
    assert_equal(model, {"a": random_codes(1, (5, 3, 100, 100), dtype), "b": random_codes(2, (3, 1, 1), dtype)})
    assert_equal(model, {"a": random_codes(1, (3, 1, 1), dtype), "b": random_codes(2, (5, 3, 100, 100), dtype)})


@pytest.mark.parametrize(("times", "zero_a", "zero_b"), [((4, 4, 24), 218, 220), ((11, 14, 14), 151, 53)])
def test_the_part_of_the_zero_points_is_rounded_as_onnx_runtime_rounds_it(times: Any, zero_a: int, zero_b: int) -> None:
    """Scales and zero points for which one rounding more of the zero points' share moves thousands of pairs."""
    scale_a, scale_b, scale_c = (np.float32(0.1) * np.float32(value) for value in times)
    graph = Graph()
    a = (graph.given("a", np.uint8), scale_a, np.uint8(zero_a))
    b = (graph.given("b", np.uint8), scale_b, np.uint8(zero_b))
    assert_equal(graph.model(graph.integer("QLinearAdd", *a, *b, scale_c, np.uint8(100))), pairs(np.uint8))
