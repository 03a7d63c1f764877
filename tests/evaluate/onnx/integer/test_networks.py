"""Whole networks, bit for bit; and what their results do not depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pennyweight.evaluate.onnx.integer.agreement import compare_layers
from pennyweight.evaluate.onnx.integer.runtime import run
from pennyweight.evaluate.onnx.integer.simulate import simulate
from tests.evaluate.onnx.integer.networks import CLASSES, residual
from tests.evaluate.onnx.integer.qdq import assert_equal

KERNELS = {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"}


@pytest.mark.parametrize("float_bias", [False, True], ids=["int32 bias", "float bias"])
@pytest.mark.parametrize("seed", range(5))
def test_a_residual_network_is_onnx_runtimes_bit_for_bit(seed: int, float_bias: bool) -> None:
    agreement = assert_equal(*residual(seed=seed, float_bias=float_bias))
    assert agreement.elements == 6 * CLASSES
    assert {layer.op for layer in agreement.layers} >= KERNELS
    assert [layer.node for layer in agreement.layers if layer.in_chain.mismatches] == []


def test_signed_activations_are_onnx_runtimes_bit_for_bit() -> None:
    """The runtime turns some of them into unsigned ones and leaves some layers in float."""
    agreement = compare_layers(*residual(dtype=np.int8))
    assert agreement.mismatches == 0
    assert agreement.first is None


def test_the_outputs_use_many_codes() -> None:
    """Else the comparisons above would say little."""
    model, inputs = residual()
    values = compare_layers(model, inputs)
    outputs = next(iter(simulate(model, inputs).values()))
    assert len(np.unique(outputs)) > 30
    assert all(layer.alone.elements > 0 for layer in values.layers)


def test_a_file_gives_what_its_proto_gives(tmp_path: Path) -> None:
    model, inputs = residual()
    onnx.save(model, tmp_path / "net.onnx")
    ours, theirs = simulate(tmp_path / "net.onnx", inputs), run(tmp_path / "net.onnx", inputs)
    assert list(ours) == list(theirs)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert compare_layers(tmp_path / "net.onnx", inputs).mismatches == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_onnx_runtimes_integers_do_not_depend_on_threads(threads: int) -> None:
    model, inputs = residual()
    assert _equal(run(model, inputs, threads=threads), run(model, inputs))


def test_onnx_runtimes_integers_do_not_depend_on_the_batch() -> None:
    model, inputs = residual()
    pictures = inputs["x"]
    alone = [run(model, {"x": pictures[i : i + 1]}) for i in range(len(pictures))]
    assert _equal({name: np.concatenate([one[name] for one in alone]) for name in alone[0]}, run(model, inputs))


def _equal(one: Any, other: Any) -> bool:
    return all((one[name] == other[name]).all() for name in other)
