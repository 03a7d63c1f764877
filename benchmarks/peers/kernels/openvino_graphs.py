"""OpenVINO's kernels: one model of compressed weights, as its optimizers write them, that multiply the same input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from torch import Tensor

from benchmarks.peers.kernels.contest import THREADS, Contestant, Facts, Mode, Size, rounded

# Beside the defaults, which round activations by groups.
_EXACT = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_MODES: dict[Mode, dict[str, str]] = {
    "int8": {},
    "float32": {**_EXACT, "INFERENCE_PRECISION_HINT": "f32"},
    "bfloat16": {**_EXACT, "INFERENCE_PRECISION_HINT": "bf16"},
}
_SAID = {"int8": "default", "float32": "f32", "bfloat16": "bf16"}


class Graph:
    """weight = scale * value, the value a constant of 4 or 8 bits; one infer request on one stream."""

    memory: Sequence[Tensor] = ()

    def __init__(self, size: Size, *, bits: int, group: int, mode: Mode) -> None:
        self._size, self._mode, self._bits, self._group = size, mode, bits, group
        self._made = rounded(size, bits=bits, group=group, scale=torch.float16)
        shape = f"g{group}" if group < size.cols else "channel"
        size_bytes = size.rows * (size.cols * bits // 8 + 2 * (size.cols // group))
        name = f"OV int{bits}_sym {shape} {_SAID[mode]}"
        self.facts = Facts(name, "openvino", bits, group, mode, size_bytes)

    def take(self, x: Tensor) -> None:
        taken = ops.parameter(list(x.shape), np.float32, name="x")
        outs = [ops.result(self._product(taken, index)) for index in range(self._size.count)]
        given: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1",
                                 "INFERENCE_NUM_THREADS": str(THREADS), **_MODES[self._mode]}  # fmt: skip
        compiled = openvino.Core().compile_model(openvino.Model(outs, [taken], "rotation"), "CPU", given)
        self._request = compiled.create_infer_request()
        self._x = x.numpy()
        self._request.set_input_tensor(openvino.Tensor(self._x, shared_memory=True))

    def _product(self, taken: Any, index: int) -> Any:
        groups = self._size.cols // self._group
        made = self._made
        shape = [self._size.rows, self._size.cols] if groups == 1 else [self._size.rows, groups, self._group]
        if self._bits == 4:
            pairs = (made.values & 15).to(torch.uint8).view(made.values.shape[0], -1, 2)
            packed = openvino.Tensor(openvino.Type.i4, shape)
            both = pairs[..., 0] | pairs[..., 1] << 4
            packed.data.reshape(-1)[:] = self._size.of_rows(both, first=index).flatten().numpy()
            values = ops.constant(packed)
        else:
            values = ops.constant(self._size.of_rows(made.values.to(torch.int8), first=index).view(shape).numpy())
        scales = self._size.of_rows(made.scales, first=index).view([*shape[:-1], 1]).numpy()
        weight = ops.multiply(ops.convert(values, np.float16), ops.constant(scales))
        if groups > 1:
            weight = ops.reshape(weight, ops.constant(np.array([self._size.rows, self._size.cols])), False)
        return ops.matmul(taken, ops.convert(weight, np.float32), False, True)

    def run(self) -> None:
        self._request.infer()

    def outcome(self, index: int) -> Tensor:
        out = torch.from_numpy(self._request.get_output_tensor(index).data.copy())
        return self._size.in_order(out, index)

    def decoded(self) -> Tensor:
        return self._made.decoded(self._size)


def contestants(size: Size, bits: int) -> Iterator[Contestant]:
    if bits in (4, 8):
        for group in (32, 128) if bits == 4 else (128, size.cols):
            for mode in _MODES:
                yield Graph(size, bits=bits, group=group, mode=mode)


def versions() -> dict[str, str]:
    return {"openvino": openvino.__version__.partition("-")[0]}
