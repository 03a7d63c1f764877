"""Whether ONNX Runtime's kernels on this processor are those that are simulated: two products with a known answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from pennyweight.core.errors import require
from pennyweight.evaluate.onnx.integer.base import Array
from pennyweight.evaluate.onnx.integer.runtime import run

_OPSETS = (("", 21), ("com.microsoft", 1))
_IR_VERSION = 10


@cache
def departures() -> tuple[str, ...]:
    """What the runtime does otherwise on this processor, in words; empty where bit-exactness can be promised."""
    found = []
    if not _sums_are_whole():
        found.append("products of uint8 and int8 are summed in pairs that saturate at 16 bits (no VNNI)")
    if not _addition_is_fused():
        found.append("QLinearAdd doesn't use fused multiply-adds (no AVX2, or not x86-64)")
    return tuple(found)


def _sums_are_whole() -> bool:
    """The largest uint8 times the largest int8, 64 times: a kernel that adds pairs in 16 bits loses half of it."""
    a, b = np.full((8, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    one, exact = np.float32(1), 64 * 255 * 127
    zero = np.uint8(0)
    codes = _run("QLinearMatMul", "", a, [one, zero, b, one, np.int8(0), np.float32(exact / 200), zero])
    return bool((codes == 200).all())


def _addition_is_fused() -> bool:
    """Four sums beside ties that two roundings too many would push to the other side."""
    a, b = np.array([165, 218, 198, 167], np.uint8), np.array([0, 5, 9, 14], np.uint8)
    tenth, zero = np.float32(0.1), np.uint8(128)
    scale_a, scale_b, scale_c = (np.float32(tenth * np.float32(times)) for times in (5, 7, 6))
    codes = _run("QLinearAdd", "com.microsoft", a, [scale_a, zero, b, scale_b, zero, scale_c, zero])
    return bool(np.array_equal(codes, [9, 60, 47, 28]))


def _run(op: str, domain: str, x: Array, constants: Sequence[Any]) -> Array:
    """A model of one node, whose first input is `x`."""
    onnx = require("onnx", extra="onnx")
    helper = onnx.helper
    names = [f"c{i}" for i in range(len(constants))]
    node = helper.make_node(op, ["x", *names], ["y"], domain=domain)
    kept = [onnx.numpy_helper.from_array(np.asarray(value), name) for value, name in zip(constants, names, strict=True)]
    given = helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)
    graph = helper.make_graph([node], op, [given], [onnx.ValueInfoProto(name="y")], kept)
    opsets = [helper.make_opsetid(name, version) for name, version in _OPSETS]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    return run(model, {"x": x}, as_it_is=True)["y"]
