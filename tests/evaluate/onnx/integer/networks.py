"""Whole QDQ networks for the tests: residual, with depthwise convolution, pools and a linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.evaluate.onnx.integer.qdq import Array, Graph

SIDE, CHANNELS, CLASSES = 12, 16, 10


@dataclass
class Edge:
    """A value after DequantizeLinear, with its scale and zero point."""

    name: str
    scale: np.float32
    zero: Any


class Network:
    """Layers of random weights; the scales follow from a guess at each layer's spread."""

    def __init__(self, *, seed: int, dtype: Any, float_bias: bool) -> None:
        self.graph = Graph()
        self.random = np.random.default_rng(seed)
        self.dtype, self.float_bias = dtype, float_bias

    def edge(self, x: str, spread: float, *, positive: bool = False) -> Edge:
        """`x` quantized so that about 4 of its standard deviations fit; after a ReLU from 0 on."""
        info = np.iinfo(self.dtype)
        middle = info.min if positive else int(self.random.integers(info.min + 90, info.max - 90))
        scale = np.float32(spread * (4 if positive else 8) / 255)
        zero = self.dtype(middle)
        return Edge(self.graph.coded(x, scale, zero), scale, zero)

    def weights(self, shape: Any, x: Edge, axis: int = 0) -> tuple[str, Any, float]:
        """(weight, bias, spread of the sums), the weight per channel and the bias float or int32."""
        w = self.random.integers(-127, 128, shape).astype(np.int8)
        scale = self.random.uniform(0.005, 0.02, shape[axis]).astype(np.float32)
        spread = float(scale.mean() * 73 * np.sqrt(w[0].size) * x.scale * 50)
        bias = self.random.normal(0, spread, shape[axis]).astype(np.float32)
        name = self.graph.decoded(w, scale, axis=axis)
        if self.float_bias:
            return name, bias, spread
        steps = x.scale * scale
        return name, self.graph.decoded(np.rint(bias / steps).astype(np.int32), steps), spread

    def convolution(self, name: str, x: Edge, shape: Any, *, relu: bool = True, **attributes: Any) -> Edge:
        w, bias, spread = self.weights(shape, x)
        y = self.graph.node("Conv", x.name, w, bias, name=name, kernel_shape=shape[2:], **attributes)
        return self.edge(self.graph.node("Relu", y) if relu else y, spread, positive=relu)

    def linear(self, name: str, x: Edge, shape: Any) -> Edge:
        w, bias, spread = self.weights(shape, x)
        return self.edge(self.graph.node("Gemm", x.name, w, bias, name=name, transB=1), spread)

    def same(self, op: str, x: Edge, **attributes: Any) -> Edge:
        """An operation that keeps scale and zero point."""
        return Edge(self.graph.coded(self.graph.node(op, x.name, **attributes), x.scale, x.zero), x.scale, x.zero)


def residual(*, seed: int = 0, dtype: Any = np.uint8, float_bias: bool = False) -> tuple[Any, dict[str, Array]]:
    """Stem, depthwise and pointwise convolution with a shortcut, pools, linear: (model, inputs of 6 pictures)."""
    net = Network(seed=seed, dtype=dtype, float_bias=float_bias)
    graph, wide = net.graph, CHANNELS
    x = net.edge(graph.given("x", shape=["n", 3, SIDE, SIDE]), 1.0)
    x = net.convolution("stem", x, (wide, 3, 3, 3), pads=[1, 1, 1, 1])
    y = net.convolution("depthwise", x, (wide, 1, 3, 3), pads=[2, 2, 2, 2], dilations=[2, 2], group=wide)
    y = net.convolution("pointwise", y, (wide, wide, 1, 1), relu=False)
    x = net.edge(graph.node("Relu", graph.node("Add", x.name, y.name, name="shortcut")), 3.0, positive=True)
    x = net.same("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 0])
    x = net.convolution("grouped", x, (2 * wide, wide // 4, 3, 3), group=4, strides=[2, 1], pads=[0, 1, 1, 0])
    x = net.edge(graph.node("GlobalAveragePool", x.name, name="average"), float(x.scale) * 60, positive=True)
    x = net.linear("classes", net.same("Flatten", x), (CLASSES, 2 * wide))
    pictures = np.random.default_rng(seed).normal(size=(6, 3, SIDE, SIDE)).astype(np.float32)
    return graph.model(x.name), {"x": pictures}
