"""ONNX Runtime, asked for three things: the graph that it runs, all of its tensors, and one float operation."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.core.errors import ModelError, require
from pennyweight.evaluate.onnx.integer.base import Array, Inputs, Node

_PROVIDERS = ["CPUExecutionProvider"]
_ERRORS_ONLY = 3


def open_session(model: Any, *, saved: Path | None = None, as_it_is: bool = False, threads: int = 0) -> Any:
    """A session on the CPU over a ModelProto or the path of a file, with the runtime's default optimizations.

    saved: where the runtime writes the graph after its optimizations. as_it_is: without optimizations.
    threads: 0 leaves the choice to the runtime. Raises ModelError with the runtime's own message.
    """
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    if as_it_is:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return runtime.InferenceSession(source, options, providers=_PROVIDERS)
    except Exception as error:
        name = str(model) if isinstance(model, Path) else model.graph.name or "the model"
        raise ModelError(f"{name}: ONNX Runtime {runtime.__version__} can't open it: {error}") from error


def optimized(model: Any) -> Any:
    """The ModelProto that the runtime runs in place of `model`: DQ-operation-Q groups are one integer node there."""
    onnx = require("onnx", extra="onnx")
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimized.onnx"
        open_session(model, saved=saved, threads=1)
        return onnx.load(str(saved))


def run(model: Any, inputs: Mapping[str, Array], *, as_it_is: bool = False, threads: int = 0) -> dict[str, Array]:
    """The outputs of `model` by name, computed by the runtime."""
    session = open_session(model, as_it_is=as_it_is, threads=threads)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def run_exposed(optimized_model: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every tensor of an optimized graph, computed by the runtime; it is run as it is, so that nothing fuses anew."""
    onnx = require("onnx", extra="onnx")
    exposed = onnx.ModelProto()
    exposed.CopyFrom(optimized_model)
    shown = {output.name for output in exposed.graph.output}
    made = [name for node in exposed.graph.node for name in node.output if name]
    exposed.graph.output.extend([onnx.ValueInfoProto(name=name) for name in made if name not in shown])
    return run(exposed, inputs, as_it_is=True, threads=1)


def run_node(node: Node, inputs: Inputs, optimized_model: Any) -> tuple[Array, ...]:
    """One node, computed by the runtime from `inputs`; constants of the graph stay constants."""
    onnx = require("onnx", extra="onnx")
    constants = [tensor for tensor in optimized_model.graph.initializer if tensor.name in node.inputs]
    fixed = {tensor.name for tensor in constants}
    feeds = {name: array for name, array in zip(node.inputs, inputs, strict=True) if name and name not in fixed}
    declared = [_declared(name, np.asarray(array)) for name, array in feeds.items()]
    results = [onnx.ValueInfoProto(name=name) for name in node.outputs if name]
    graph = onnx.helper.make_graph([node.proto], node.name, declared, results, constants)
    model = onnx.helper.make_model(
        graph, opset_imports=optimized_model.opset_import, ir_version=optimized_model.ir_version
    )
    try:
        outputs = run(model, {name: np.asarray(array) for name, array in feeds.items()}, as_it_is=True, threads=1)
    except Exception as error:
        raise ModelError(f"node {node.name} ({node.op}) can't be run by itself: {error}") from error
    return tuple(outputs[name] if name else np.zeros(0) for name in node.outputs)


def _declared(name: str, array: Array) -> Any:
    onnx = require("onnx", extra="onnx")
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)
