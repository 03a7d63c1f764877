"""The graph that ONNX Runtime says it runs: its nodes in order, its constants, what goes in and comes out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.core.errors import require
from pennyweight.evaluate.onnx.integer.base import Array, Node
from pennyweight.evaluate.onnx.integer.runtime import optimized

# The runtime appends this to the name of the node from which it made another.
_MADE_FROM = re.compile(r"(_token_\d+)+$")


@dataclass(frozen=True)
class RuntimeGraph:
    """`proto` is the optimized ModelProto; `nodes` are in an order in which they can be computed."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    proto: Any


def runtime_graph(model: Any | Path) -> RuntimeGraph:
    """The graph that the runtime makes of `model` (a ModelProto, or the path of a file) with its default settings.

    Which groups of DequantizeLinear, operation and QuantizeLinear become one integer node depends on the runtime's
    version, the processor and the neighbours (one more consumer can leave a convolution in float). So it is asked.
    """
    numpy_helper = require("onnx.numpy_helper", extra="onnx")
    proto = optimized(model)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return RuntimeGraph(
        nodes=tuple(_node(node) for node in proto.graph.node),
        constants=constants,
        inputs=tuple(value.name for value in proto.graph.input if value.name not in constants),
        outputs=tuple(value.name for value in proto.graph.output),
        proto=proto,
    )


def _node(proto: Any) -> Node:
    helper = require("onnx.helper", extra="onnx")
    # An operation's name is known by itself in the runtime's own domain too, but not in others'.
    op = proto.op_type if proto.domain in ("", "ai.onnx", "com.microsoft") else f"{proto.domain}.{proto.op_type}"
    return Node(
        name=_MADE_FROM.sub("", proto.name) or f"{op} of {proto.output[0]}",
        op=op,
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        attributes={attribute.name: helper.get_attribute_value(attribute) for attribute in proto.attribute},
        proto=proto,
    )
