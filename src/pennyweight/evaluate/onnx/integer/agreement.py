"""Where ONNX Runtime and the simulation differ, counted and named by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.core.errors import VerificationError, require
from pennyweight.evaluate.onnx.integer.base import Arithmetic, Array
from pennyweight.evaluate.onnx.integer.graph import RuntimeGraph, runtime_graph
from pennyweight.evaluate.onnx.integer.runtime import run, run_exposed
from pennyweight.evaluate.onnx.integer.simulate import arguments, compute, trace


@dataclass(frozen=True)
class Difference:
    """Of two arrays: how many elements, how many of them differ, and the largest difference (in codes for integers)."""

    elements: int
    mismatches: int
    largest: float

    @staticmethod
    def between(ours: Array, theirs: Array) -> Difference:
        """Arrays of different shape or type differ in every element; NaN equals NaN."""
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return Difference(theirs.size, theirs.size, float("inf"))
        differs = (ours != theirs) & ~((ours != ours) & (theirs != theirs))
        if not differs.any():
            return Difference(theirs.size, 0, 0.0)
        gap = np.abs(ours[differs].astype(np.float64) - theirs[differs].astype(np.float64))
        return Difference(theirs.size, int(differs.sum()), float(gap.max()))


@dataclass(frozen=True)
class Layer:
    """One tensor of the runtime's graph and the node that makes it.

    alone: the node simulated from the runtime's own inputs to it, so that a mismatch is this node's.
    in_chain: the same tensor in a simulation that only ever saw its own results.
    """

    node: str
    op: str
    tensor: str
    arithmetic: Arithmetic
    alone: Difference
    in_chain: Difference


@dataclass(frozen=True)
class Agreement:
    """ONNX Runtime against the simulation, on the inputs given."""

    runtime: str
    outputs: Mapping[str, Difference]
    layers: tuple[Layer, ...]

    @property
    def elements(self) -> int:
        """Output values compared."""
        return sum(difference.elements for difference in self.outputs.values())

    @property
    def mismatches(self) -> int:
        """Output values that differ."""
        return sum(difference.mismatches for difference in self.outputs.values())

    @property
    def first(self) -> Layer | None:
        """The first layer that differs when it gets the runtime's own inputs."""
        return next((layer for layer in self.layers if layer.alone.mismatches), None)

    @property
    def not_simulated(self) -> tuple[Layer, ...]:
        """The layers that the runtime itself computed: no promise is made for them."""
        return tuple(layer for layer in self.layers if layer.arithmetic == "float")

    def check(self) -> None:
        """Raise VerificationError where an output or a layer differs."""
        if not self.mismatches and self.first is None:
            return
        count = f"{self.mismatches} of {self.elements} outputs differ from {self.runtime}"
        if self.first is None:
            raise VerificationError(f"{count}, though no layer does by itself: the runtime isn't repeatable here")
        layer = self.first
        raise VerificationError(
            f"{count}; the first layer that does is {layer.node} ({layer.op}): {layer.alone.mismatches} of "
            f"{layer.alone.elements} values, by {layer.alone.largest:g} at most. On a processor without VNNI or AVX2 "
            f"the runtime rounds and saturates otherwise: compare on one that has them, or report the layer"
        )


def compare_layers(model: Any | Path, inputs: Mapping[str, Array]) -> Agreement:
    """Run `model` (a ModelProto, or the path of a file) in ONNX Runtime and in the simulation and compare all tensors.

    The outputs are those of a session with the runtime's default settings. The tensors in between come from the same
    optimized graph with all of them exposed, run as it is, which leaves its kernels as they were.
    Memory: every tensor of the graph, twice.
    """
    graph = runtime_graph(model)
    ours, arithmetic = trace(graph, inputs)
    theirs = run(model, inputs)
    exposed = run_exposed(graph.proto, inputs)
    version = require("onnxruntime", extra="onnx").__version__
    return Agreement(
        runtime=f"ONNX Runtime {version}",
        outputs={name: Difference.between(_known(name, ours, graph, inputs), theirs[name]) for name in graph.outputs},
        layers=_layers(graph, inputs, ours=ours, theirs=exposed, arithmetic=arithmetic),
    )


def _known(name: str, values: Mapping[str, Array], graph: RuntimeGraph, inputs: Mapping[str, Array]) -> Array:
    return next(source[name] for source in (values, graph.constants, inputs) if name in source)


def _layers(
    graph: RuntimeGraph,
    inputs: Mapping[str, Array],
    *,
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
    arithmetic: Mapping[str, Arithmetic],
) -> tuple[Layer, ...]:
    layers = []
    for node in graph.nodes:
        results, _ = compute(node, arguments(node, graph, theirs, inputs), graph)
        for name, alone in zip(node.outputs, results, strict=True):
            if name:
                layers.append(
                    Layer(
                        node=node.name,
                        op=node.op,
                        tensor=name,
                        arithmetic=arithmetic[name],
                        alone=Difference.between(alone, theirs[name]),
                        in_chain=Difference.between(ours[name], theirs[name]),
                    )
                )
    return tuple(layers)
