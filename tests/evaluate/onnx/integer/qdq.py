"""A builder of small QDQ models, and scales that make ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pennyweight.evaluate.onnx.integer.agreement import Agreement, compare_layers

OPSET, IR_VERSION = 21, 10
Array = np.ndarray[Any, Any]
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
}


class Graph:
    """Nodes are added one after the other; each call gives the name of its result."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._count = 0

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._count}"

    def given(self, name: str, dtype: Any = np.float32, shape: Any = None) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[np.dtype(dtype)], shape))
        return name

    def constant(self, value: Any) -> str:
        name = self._name("constant")
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, *inputs: Any, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Inputs that are no names become constants."""
        (result,) = self.nodes(op, *inputs, name=name, domain=domain, **attributes)
        return result

    def nodes(
        self, op: str, *inputs: Any, count: int = 1, name: str = "", domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node of `count` results."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        results = [self._name(op.lower()) for _ in range(count)]
        self._nodes.append(helper.make_node(op, names, results, name=name or results[0], domain=domain, **attributes))
        return results

    def integer(self, op: str, *inputs: Any, **attributes: Any) -> str:
        """A node of the runtime's own domain."""
        return self.node(op, *inputs, domain="com.microsoft", **attributes)

    def coded(self, x: str, scale: float, zero: Any) -> str:
        """x through QuantizeLinear and DequantizeLinear."""
        codes = self.node("QuantizeLinear", x, np.float32(scale), zero)
        return self.node("DequantizeLinear", codes, np.float32(scale), zero)

    def decoded(self, codes: Array, scale: Any, zero: Any = None, axis: int = 0) -> str:
        """A constant of codes through DequantizeLinear; per channel along `axis` if there are several scales."""
        scale = np.asarray(scale, np.float32)
        zero = np.zeros(scale.shape, codes.dtype) if zero is None else zero
        return self.node("DequantizeLinear", codes, scale, zero, axis=axis)

    def model(self, *results: str) -> Any:
        outputs = [onnx.ValueInfoProto(name=name) for name in results]
        graph = helper.make_graph(self._nodes, "test", self._inputs, outputs, self._constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


DTYPES = st.sampled_from([np.uint8, np.int8])
SEEDS = st.integers(0, 2**32 - 1)


def scales(count: int) -> st.SearchStrategy[list[np.float32]]:
    """Scales in ratios of small numbers, in units that float32 rounds: sums fall on ties, or just beside them.

    They come from a seed: numbers that hypothesis draws by itself are too round for roundings to matter.
    """

    def drawn(seed: int) -> list[np.float32]:
        random = np.random.default_rng(seed)
        unit = np.float32(np.exp(random.uniform(-6, 0)))
        times = random.integers(1, 16, count) * random.choice([0.5, 1, 2], count)
        return [unit * np.float32(value) for value in times]

    return SEEDS.map(drawn)


def zeros(dtype: Any) -> st.SearchStrategy[Any]:
    info = np.iinfo(dtype)
    return st.one_of(st.sampled_from([info.min, info.max]), SEEDS.map(lambda seed: info.min + seed % 256)).map(dtype)


def scales_near_ties(scale_x: np.float32, scale_y: np.float32, count: int) -> Array:
    """Weight scales [count] for which k * (scale_x * scale_w / scale_y) is beside a half for many integers k.

    Whether it is above, below or on it depends on the order in which the multiplier's float32 product is rounded.
    """
    random = np.random.default_rng(count)
    ratios = (2 * random.integers(0, 4, count) + 1) / (2 * random.choice([1, 3, 5, 7], count))
    exact = (ratios * float(scale_y) / float(scale_x)).astype(np.float32)
    return np.nextafter(exact, exact * random.choice([0, 1, 2], count).astype(np.float32))


def random_codes(seed: int, shape: Any, dtype: Any) -> Array:
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


def assert_equal(model: Any, inputs: dict[str, Array]) -> Agreement:
    """Every tensor is ONNX Runtime's, bit for bit, and none was computed by ONNX Runtime."""
    agreement = compare_layers(model, inputs)
    assert [layer.node for layer in agreement.not_simulated] == []
    assert [(layer.op, layer.alone) for layer in agreement.layers if layer.alone.mismatches] == []
    assert agreement.mismatches == 0
    return agreement
