"""Quantized networks for the tests of ONNX files, and the two real readers of these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from pennyweight.containers.onnx import edges_of
from pennyweight.models.network import Network, QuantizedNetwork, capture, fold_batch_norms
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.activation import ActivationParameters, ActivationScheme, parse_network_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest

# Of torch about itself, when a graph is copied.
IGNORED = "ignore:.isinstance.treespec, LeafSpec:FutureWarning"


def quantized(net: nn.Module, example: Any, scheme: str, *, keep: Sequence[str] = ()) -> QuantizedNetwork:
    """`net` rounded to nearest, but for the sites `keep`; ranges of edges from the smallest to the largest value."""
    return rounded(fold_batch_norms(capture(net, example)), scheme, keep=keep)


def rounded(network: Network, scheme: str, *, keep: Sequence[str] = ()) -> QuantizedNetwork:
    """The same of a network that is captured already."""
    chosen = parse_network_scheme(scheme)
    weights: dict[str, QuantizedWeight] = {}
    for site in network.sites:
        if site.name not in keep:
            matrix = site.matrix(network.weight(site).detach())
            weights[site.name] = Nearest().solve(matrix, chosen.weight, Statistics()).weight
    edges: dict[str, ActivationScheme] = {}
    parameters: dict[str, ActivationParameters] = {}
    if chosen.activation is not None:
        found = edges_of(network, sites=list(weights), is_dynamic=chosen.activation.is_dynamic)
        edges = {edge.value: chosen.activation for edge in found}
        if not chosen.activation.is_dynamic:
            values = values_of(network)
            ends = {edge.value: values[edge.source] for edge in found}
            parameters = {
                name: chosen.activation.parameters(float(value.min()), float(value.max()))
                for name, value in ends.items()
            }
    plan = Plan(dict.fromkeys(weights, chosen.weight), dict.fromkeys(keep, "kept"), edges=edges)
    return QuantizedNetwork(network, weights, parameters, plan)


def values_of(network: Network) -> dict[str, Tensor]:
    """All values of the graph on the example."""
    values: dict[str, Tensor] = {}

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Noting(network.graph).run(*network.example.args)
    return values


def simulated(network: QuantizedNetwork, *inputs: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        result = network.simulated()(*inputs)
    return [part.numpy() for part in (result if isinstance(result, tuple) else (result,))]


def session(path: Path, *, is_plain: bool = False) -> onnxruntime.InferenceSession:
    """A session of ONNX Runtime on one thread; `is_plain`: without any fusion."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if is_plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def by_onnxruntime(path: Path, *inputs: Tensor, is_plain: bool = False) -> list[np.ndarray]:
    opened = session(path, is_plain=is_plain)
    given = {entry.name: value.numpy() for entry, value in zip(opened.get_inputs(), inputs, strict=True)}
    return opened.run(None, given)


def operations(path: Path) -> list[str]:
    """What ONNX Runtime runs."""
    session(path)
    return [node.op_type for node in onnx.load(path.with_suffix(".optimized")).graph.node]


def by_openvino(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    """In float32, without the rounding of its own that OpenVINO does by default."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    result = compiled([value.numpy() for value in inputs])
    return [result[index] for index in range(len(compiled.outputs))]


def distance(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """The greatest difference beside the greatest number."""
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in zip(one, other, strict=True))
