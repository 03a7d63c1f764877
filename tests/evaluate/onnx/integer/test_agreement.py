"""Differences are found, counted and named by layer; nodes without an integer kernel are listed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from pennyweight.core.errors import ModelError, UsageError, VerificationError
from pennyweight.evaluate.onnx.integer import convolution, elementwise
from pennyweight.evaluate.onnx.integer.agreement import Difference, compare_layers
from pennyweight.evaluate.onnx.integer.probe import departures
from pennyweight.evaluate.onnx.integer.rounding import integer_limits
from pennyweight.evaluate.onnx.integer.simulate import simulate
from tests.evaluate.onnx.integer.networks import residual
from tests.evaluate.onnx.integer.qdq import Array, Graph


def half_away_from_zero(sums: Array, multiplier: Any, zero: int, *, dtype: Any) -> Array:
    """The rounding of C's roundf, in place of ties to even."""
    low, high = integer_limits(dtype)
    x = np.clip(sums.astype(np.float32) * multiplier, low - zero, high - zero)
    return (np.trunc(x + np.copysign(np.float32(0.5), x)).astype(np.int32) + zero).astype(dtype)


def two_convolutions() -> tuple[Any, dict[str, Array]]:
    """The first has no ties (a multiplier of 1/3); in the second (1/2) every other sum is one."""
    graph = Graph()
    x = graph.coded(graph.given("x", shape=["n", 1, 8, 8]), 1.0, np.uint8(0))
    one = graph.decoded(np.ones((1, 1, 1, 1), np.int8), 1.0)
    x = graph.coded(graph.node("Conv", x, one, name="thirds"), 3.0, np.uint8(0))
    x = graph.coded(graph.node("Conv", x, one, name="halves"), 6.0, np.uint8(0))
    x = graph.coded(graph.node("Conv", x, one, name="after"), 5.0, np.uint8(0))
    return graph.model(x), {"x": np.arange(256, dtype=np.float32).reshape(4, 1, 8, 8)}


def test_a_planted_wrong_rounding_is_found_and_its_layer_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = two_convolutions()
    compare_layers(model, inputs).check()
    monkeypatch.setattr(convolution, "requantize", half_away_from_zero)
    agreement = compare_layers(model, inputs)
    assert agreement.first is not None
    assert (agreement.first.node, agreement.first.op) == ("halves", "QLinearConv")
    assert agreement.first.alone.largest == 1
    # Codes 1, 5, 9 ... of 0 to 85, three pixels each and the last one two, lie half way above an even code.
    assert agreement.first.alone.mismatches == 3 * 21 + 2
    assert agreement.mismatches > 0
    with pytest.raises(VerificationError, match=r"halves \(QLinearConv\): 65 of 256 values, by 1 at most"):
        agreement.check()


def test_a_planted_wrong_sum_of_two_edges_is_found_in_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that is off by a thousandth differs in few codes, and what follows differs only for its sake."""
    model, inputs = residual(seed=1)
    monkeypatch.setattr(elementwise, "fused_multiply_add", lambda a, b, c: (a * b + c) * np.float32(1.001))
    agreement = compare_layers(model, inputs)
    assert agreement.first is not None
    assert agreement.first.node == "shortcut"
    later = [layer for layer in agreement.layers if layer.in_chain.mismatches]
    assert {layer.node for layer in later} > {"shortcut"}
    assert [layer.node for layer in agreement.layers if layer.alone.mismatches] == ["shortcut"]


def test_a_node_without_integer_kernel_is_listed_and_computed_from_our_codes() -> None:
    graph = Graph()
    x = graph.coded(graph.given("x", shape=[2, 4, 5, 5]), 0.02, np.uint8(100))
    w = graph.decoded(np.arange(-40, 40, dtype=np.int8).reshape(4, 5, 2, 2), 0.1)
    y = graph.coded(graph.node("ConvTranspose", x, w, name="upward"), 0.5, np.uint8(128))
    inputs = {"x": np.random.default_rng(1).normal(size=(2, 4, 5, 5)).astype(np.float32)}
    agreement = compare_layers(graph.model(y), inputs)
    assert [(layer.node, layer.arithmetic) for layer in agreement.not_simulated] == [("upward", "float")]
    agreement.check()


def test_differences_are_counted_in_codes() -> None:
    ours, theirs = np.array([0, 255, 3], np.uint8), np.array([255, 255, 4], np.uint8)
    assert Difference.between(ours, theirs) == Difference(3, 2, 255.0)
    assert Difference.between(theirs, theirs) == Difference(3, 0, 0.0)
    assert Difference.between(ours[:2], theirs) == Difference(3, 3, float("inf"))
    floats = np.array([np.nan, 1.0], np.float32)
    assert Difference.between(floats, floats.copy()) == Difference(2, 0, 0.0)


def test_inputs_that_are_not_the_models_are_refused() -> None:
    model, inputs = residual()
    with pytest.raises(UsageError, match=r"takes the inputs \['x'\] and was given \['y'\]"):
        simulate(model, {"y": inputs["x"]})


def test_a_model_that_the_runtime_can_not_open_is_named() -> None:
    graph = onnx.helper.make_graph([onnx.helper.make_node("NoSuchOp", ["x"], ["y"])], "broken", [], [])
    with pytest.raises(ModelError, match="broken: ONNX Runtime .* can't open it"):
        simulate(onnx.helper.make_model(graph), {})


def test_this_processor_has_the_kernels_that_are_simulated() -> None:
    assert departures() == ()
