"""The simulation of a QDQ file as ONNX Runtime runs it: every integer node by our own formulas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.core.errors import UsageError
from pennyweight.core.registry import provided
from pennyweight.evaluate.onnx.integer.base import Arithmetic, Array, Inputs, Kernel, Node
from pennyweight.evaluate.onnx.integer.graph import RuntimeGraph, runtime_graph
from pennyweight.evaluate.onnx.integer.runtime import run_node


def simulate(model: Any | Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of `model` (a ModelProto, or the path of a file) for `inputs`, by name.

    Nodes for which there is no integer kernel are computed by the runtime from our values: `compare_layers` lists
    them. Raises UsageError for inputs that aren't the model's, ModelError where the runtime can't open it.
    """
    graph = runtime_graph(model)
    values: dict[str, Array] = {}
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    for i, (node, results, _) in enumerate(_steps(graph, inputs, values)):
        values.update(results)
        for name in (*node.inputs, *node.outputs):
            if last_use.get(name, -1) <= i and name not in graph.outputs:
                values.pop(name, None)
    known = {**graph.constants, **inputs, **values}
    return {name: known[name] for name in graph.outputs}


def trace(graph: RuntimeGraph, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Arithmetic]]:
    """Every tensor that the nodes of `graph` make from `inputs`, and the arithmetic of each."""
    values: dict[str, Array] = {}
    arithmetic: dict[str, Arithmetic] = {}
    for _, results, kind in _steps(graph, inputs, values):
        values.update(results)
        arithmetic.update(dict.fromkeys(results, kind))
    return values, arithmetic


def _steps(
    graph: RuntimeGraph, inputs: Mapping[str, Array], values: Mapping[str, Array]
) -> Iterator[tuple[Node, dict[str, Array], Arithmetic]]:
    """Node after node, with what it makes of `values`, into which the caller puts the results."""
    check_inputs(graph, inputs)
    for node in graph.nodes:
        results, kind = compute(node, arguments(node, graph, values, inputs), graph)
        yield node, {name: array for name, array in zip(node.outputs, results, strict=True) if name}, kind


def check_inputs(graph: RuntimeGraph, inputs: Mapping[str, Array]) -> None:
    if set(inputs) != set(graph.inputs):
        raise UsageError(
            f"the model takes the inputs {sorted(graph.inputs)} and was given {sorted(inputs)}: give one array for each"
        )


def arguments(node: Node, graph: RuntimeGraph, *known: Mapping[str, Array]) -> Inputs:
    """What `node` gets, from the constants of `graph` or else from the first of `known` that has it."""
    sources = (graph.constants, *known)
    return [next(source[name] for source in sources if name in source) if name else None for name in node.inputs]


def compute(node: Node, inputs: Inputs, graph: RuntimeGraph) -> tuple[tuple[Array, ...], Arithmetic]:
    """The outputs of `node`, and in which arithmetic they were computed."""
    kernel: Kernel | None = provided("evaluate.onnx.integer").get(node.op)
    if kernel is None or not kernel.covers(node, inputs):
        return run_node(node, inputs, graph.proto), "float"
    return tuple(np.asarray(array, order="C") for array in kernel.run(node, inputs)), kernel.arithmetic
