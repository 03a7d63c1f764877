"""ONNX Runtime's kernels: one model whose nodes multiply the same input with each weight of a rotation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from benchmarks.peers.kernels.contest import THREADS, Contestant, Facts, Rounded, Size, rounded

_IR_VERSION, _OPSET = 10, 21
# MatMulNBits: 4 rounds activations to 8 bits, 0 leaves them in float32.
_ACCURACY_LEVELS = {4: "int8", 0: "float32"}


@dataclass(frozen=True)
class _Weights:
    """What the nodes of a model are: `node` gives one and its initializers, named by an index."""

    facts: Facts
    decoded: Tensor
    node: Any


class Nodes:
    """The weights as initializers of one session, which keeps them in the order its kernel wants."""

    memory: Sequence[Tensor] = ()

    def __init__(self, size: Size, weights: _Weights) -> None:
        self.facts, self._weights, self._size = weights.facts, weights, size
        nodes, initializers = [], []
        for index in range(size.count):
            node, constants = weights.node(index)
            nodes.append(node)
            initializers += constants
        taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", size.cols])
        given = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["tokens", size.rows])
                 for i in range(size.count)]  # fmt: skip
        graph = helper.make_graph(nodes, "rotation", [taken], given, initializers)
        domains = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=_IR_VERSION)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def take(self, x: Tensor) -> None:
        self._x = x.numpy()
        self._outs = [np.empty((x.shape[0], self._size.rows), dtype=np.float32) for _ in range(self._size.count)]
        self._binding = self._session.io_binding()
        self._bind(self._binding.bind_input, "x", self._x)
        for index, out in enumerate(self._outs):
            self._bind(self._binding.bind_output, f"y{index}", out)

    @staticmethod
    def _bind(bind: Any, name: str, array: np.ndarray) -> None:
        bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def outcome(self, index: int) -> Tensor:
        return self._size.in_order(torch.from_numpy(self._outs[index]), index)

    def decoded(self) -> Tensor:
        return self._weights.decoded


def _few_bits(size: Size, bits: int, group: int, accuracy_level: int) -> _Weights:
    """MatMulNBits: codes from 0 with a zero point in their middle, the lowest bits first, a float32 scale a block."""
    made = rounded(size, bits=bits, group=group, scale=torch.float32)
    packed = _packed(made.codes, bits)

    def node(index: int) -> tuple[Any, list[Any]]:
        codes = size.of_rows(packed, first=index).view(size.rows, size.cols // group, -1).numpy()
        scales = size.of_rows(made.scales, first=index).flatten().numpy()
        named = [numpy_helper.from_array(codes, f"w{index}"), numpy_helper.from_array(scales, f"s{index}")]
        return helper.make_node(
            "MatMulNBits", ["x", f"w{index}", f"s{index}"], [f"y{index}"], domain="com.microsoft", K=size.cols,
            N=size.rows, bits=bits, block_size=group, accuracy_level=accuracy_level,
        ), named  # fmt: skip

    name = f"ORT MatMulNBits {bits}b blk{group} acc{accuracy_level}"
    size_bytes = size.rows * (packed.shape[1] + 4 * size.cols // group)
    facts = Facts(name, "onnxruntime", bits, group, _ACCURACY_LEVELS[accuracy_level], size_bytes)
    return _Weights(facts, made.decoded(size), node)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, cols * bits / 8]."""
    each = 8 // bits
    parts = codes.view(codes.shape[0], -1, each)
    return sum((parts[..., i] << (i * bits) for i in range(each)), torch.zeros_like(parts[..., 0]))


def _eight_bits(size: Size) -> _Weights:
    """DynamicQuantizeMatMul: int8 [cols, rows] with a scale for each row, activations rounded to uint8 as a whole."""
    made: Rounded = rounded(size, bits=8, group=size.cols, scale=torch.float32)
    codes, zeros = made.values.to(torch.int8), np.zeros(size.rows, dtype=np.int8)

    def node(index: int) -> tuple[Any, list[Any]]:
        values = np.ascontiguousarray(size.of_rows(codes, first=index).numpy().T)
        scales = size.of_rows(made.scales, first=index).flatten().numpy()
        arrays = {"w": values, "s": scales, "z": zeros}
        named = [numpy_helper.from_array(array, f"{letter}{index}") for letter, array in arrays.items()]
        words = ["x", f"w{index}", f"s{index}", f"z{index}"]
        return helper.make_node("DynamicQuantizeMatMul", words, [f"y{index}"], domain="com.microsoft"), named

    size_bytes = size.rows * (size.cols + 4)
    facts = Facts("ORT DynamicQuantizeMatMul int8", "onnxruntime", 8, size.cols, "int8", size_bytes)
    return _Weights(facts, made.decoded(size), node)


def contestants(size: Size, bits: int) -> Iterator[Contestant]:
    if bits in (2, 4, 8):
        for group in (32, 128):
            for accuracy_level in _ACCURACY_LEVELS:
                yield Nodes(size, _few_bits(size, bits, group, accuracy_level))
    if bits == 8:
        yield Nodes(size, _eight_bits(size))


def versions() -> dict[str, str]:
    return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
