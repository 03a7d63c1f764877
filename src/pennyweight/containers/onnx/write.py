"""A quantized network as an ONNX file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from pennyweight.containers.onnx.calls import Written, written_sites
from pennyweight.containers.onnx.dialect import IR_VERSIONS, OPSETS, Dialect, Runtime
from pennyweight.containers.onnx.export import exported
from pennyweight.containers.onnx.graph import Graph
from pennyweight.containers.onnx.guard import guard
from pennyweight.containers.onnx.markers import DOMAIN, marked
from pennyweight.containers.onnx.read import METADATA, described
from pennyweight.containers.onnx.report import OnnxReport, notes_of
from pennyweight.containers.onnx.rewrite import MICROSOFT, Rewriting
from pennyweight.containers.onnx.rules import why_not, why_not_activation
from pennyweight.core.errors import ContainerError
from pennyweight.core.files import check_space
from pennyweight.models.network.network import Network
from pennyweight.models.network.quantized import QuantizedNetwork

# Protocol buffers hold less than 2 GiB; tensors may be far smaller than the names and nodes beside them.
EXTERNAL_BYTES = 2_000_000_000


def write_onnx(
    quantized: QuantizedNetwork,
    path: Path,
    *,
    runtime: Runtime = "onnxruntime",
    is_portable: bool = False,
    accuracy_level: int = 4,
    external_bytes: int = EXTERNAL_BYTES,
) -> OnnxReport:
    """Write `quantized` as `path`, whole or not at all, for `runtime` to read.

    is_portable     operations of the standard alone: for readers that have none of ONNX Runtime's own
    accuracy_level  of MatMulNBits, for weights alone: 4 rounds its input to 8 bits a block (fast), 0 is exact
    external_bytes  from this size on the tensors lie in a file beside, `path` and ".data"

    Codes are written as they are; nothing is rounded but biases beside products of integers, to 32 bits. Raises
    ContainerError for what the file cannot hold, with the site.
    """
    dialect = Dialect(runtime, is_portable, accuracy_level)
    _check(quantized, dialect)
    written = written_sites(quantized, dialect)
    opset = _opset(quantized, written)
    graph = Graph(exported(marked(quantized, written), opset))
    rewriting = Rewriting(graph, quantized, written, dialect)
    rewriting.run()
    guarded = guard(graph)
    graph.finish(_output_names(quantized.network))
    _finish(graph.model, opset, described(written, rewriting.weights.names()))
    size = _save(graph.model, path, external_bytes)
    sizes = {name: site.stored.size_bytes for name, site in written.items()}
    forms = {name: site.form for name, site in written.items()}
    blocks = {name: block for name, site in written.items() if (block := site.input_block(dialect)) is not None}
    return OnnxReport(opset, sizes, forms, blocks, notes_of(quantized, written, dialect, guarded), size)


def write_float_onnx(network: Network, path: Path, *, external_bytes: int = EXTERNAL_BYTES) -> OnnxReport:
    """Write the float network, to compare with."""
    opset = min(OPSETS.values())
    graph = Graph(exported(network.copied(), opset))
    graph.finish(_output_names(network))
    _finish(graph.model, opset, "")
    return OnnxReport(opset, {}, {}, {}, (), _save(graph.model, path, external_bytes))


def _check(quantized: QuantizedNetwork, dialect: Dialect) -> None:
    for name, weight in quantized.weights.items():
        reason = why_not(weight.scheme, quantized.network.site(name), dialect.runtime)
        if reason is not None:
            raise ContainerError(f"{name}: {reason}")
    known = {node.name for node in quantized.network.graph.graph.nodes}
    for value, scheme in quantized.plan.edges.items():
        reason = why_not_activation(scheme)
        if value not in known:
            reason = "no value of the network has this name"
        elif not scheme.is_dynamic and value not in quantized.activations:
            reason = "has no scale and zero point: calibrate it, or use a dynamic scheme"
        if reason is not None:
            raise ContainerError(f"edge {value}: {reason}")
    for name, tensor in quantized.network.graph.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ContainerError(f"{name} is {tensor.dtype}: ONNX files are written of float32 networks: use .float()")


def _opset(quantized: QuantizedNetwork, written: Mapping[str, Written]) -> int:
    """The lowest that has all types and operations."""
    bits = [8, *(site.stored.bits for site in written.values() if site.stored.block is None)]
    bits += [scheme.element.bits for scheme in quantized.plan.edges.values()]
    blocked = [OPSETS[4] for site in written.values() if _is_blocked(site)]
    return max(OPSETS[min(bits)], *blocked, 0)


def _is_blocked(site: Written) -> bool:
    """Whether DequantizeLinear has groups."""
    stored = site.stored
    return stored.block is None and not stored.is_spread and len(stored.scale_shape) == 2


def _output_names(network: Network) -> list[str]:
    result = next(node for node in reversed(network.graph.graph.nodes) if node.op == "output").args[0]
    return [leaf.name for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, fx.Node)]


def _finish(model: Any, opset: int, description: str) -> None:
    from pennyweight import __version__

    imports = model.graph.opset_imports
    imports.pop(DOMAIN, None)
    if any(node.domain == MICROSOFT for node in model.graph):
        imports[MICROSOFT] = 1
    model.ir_version = IR_VERSIONS[opset]
    model.producer_name, model.producer_version = "pennyweight", __version__
    _without_remarks(model)
    if description:
        model.metadata_props[METADATA] = description


def _without_remarks(model: Any) -> None:
    """Drop what the exporter says of where things come from, and the shapes between, which readers find themselves."""
    graph = model.graph
    made = [value for node in graph for value in node.outputs]
    inner = [value for value in (*graph.initializers.values(), *made) if not value.is_graph_output()]
    for noted in (model, graph, *graph, *graph.inputs, *graph.outputs, *inner):
        noted.metadata_props.clear()
        noted.doc_string = None
    for value in inner:
        value.type = value.shape = None


def _save(model: Any, path: Path, external_bytes: int) -> int:
    """Bytes of the files. They are made in a directory beside `path` and then moved to their places."""
    import onnx_ir

    values = list(model.graph.initializers.values())
    size = sum(value.const_value.nbytes for value in values)
    if not path.parent.is_dir():
        raise ContainerError(f"{path}: {path.parent} is no directory: make it first")
    check_space(path.parent, size)
    beside = f"{path.name}.data" if size >= external_bytes else None
    directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        onnx_ir.save(model, directory / path.name, format="protobuf", external_data=beside)
        files = sorted(directory.iterdir(), key=lambda file: file.name == path.name)
        total = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, path.with_name(file.name))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return total
