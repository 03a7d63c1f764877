"""An ONNX graph that is rewritten: nodes are put before a marker, and what they give takes its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from pennyweight.containers.onnx.markers import DOMAIN
from pennyweight.containers.onnx.packing import to_bytes
from pennyweight.containers.onnx.stored import Array
from pennyweight.core.errors import require

# Of onnx_ir, which is imported only where files are written.
Value = Any
Node = Any


class Graph:
    """The main graph of an onnx_ir Model, with a place at which nodes are inserted."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._ir = require("onnx_ir", extra="onnx")
        self._graph = model.graph
        self._here: Node | None = None

    def markers(self) -> Iterator[tuple[Node, str, dict[str, Any]]]:
        """Each marker, its kind and its attributes, in order; what is made meanwhile goes in front of it."""
        for node in list(self._graph):
            if node.domain == DOMAIN:
                self._here = node
                yield node, node.op_type, {name: attribute.value for name, attribute in node.attributes.items()}

    def make(
        self,
        op: str,
        inputs: Sequence[Value | None],
        *,
        name: str = "",
        domain: str = "",
        outputs: int = 1,
        attributes: Mapping[str, Any] | None = None,
    ) -> Value:
        """The result of a new node; with several `outputs` a tuple of them."""
        ir = self._ir
        given = ir.convenience.convert_attributes(dict(attributes or {}))
        node = ir.Node(domain, op, list(inputs), given, num_outputs=outputs, name=name or None)
        for index, value in enumerate(node.outputs):
            value.name = f"{name or op}{f'_{index}' if index else ''}"
        self._graph.insert_before(self._here, node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def before(self, node: Node) -> None:
        """What is made from now on goes in front of `node`."""
        self._here = node

    def array(self, name: str, array: Array) -> Value:
        """A new initializer."""
        ir, onnx = self._ir, require("onnx", extra="onnx")
        proto = onnx.TensorProto(name=name, data_type=onnx.TensorProto.DataType.Value(array.type), raw_data=array.data)
        proto.dims.extend(array.shape)
        tensor = ir.serde.deserialize_tensor(proto)
        value = ir.Value(
            name=self._free(name), type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
        tensor.name = value.name
        self._graph.register_initializer(value)
        return value

    def tensor(self, name: str, tensor: Tensor, kind: str) -> Value:
        """The same of a torch tensor whose bytes are those of the ONNX type `kind`."""
        return self.array(name, Array(kind, tuple(tensor.shape), to_bytes(tensor)))

    def _free(self, name: str) -> str:
        while name in self._graph.initializers:
            name += "_"
        return name

    def replace(self, marker: Node, value: Value) -> None:
        """Let `value` take the place of what `marker` gives."""
        old = marker.outputs[0]
        value.type, value.shape = old.type, old.shape
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self._graph.remove(marker, safe=True)

    def nodes(self) -> list[Node]:
        return list(self._graph)

    def zero_int8(self) -> dict[str, Any]:
        """The attribute of ConstantOfShape that gives INT8 zeros."""
        onnx = require("onnx", extra="onnx")
        proto = onnx.TensorProto(name="value", data_type=onnx.TensorProto.INT8, dims=[1], raw_data=b"\0")
        return {"value": self._ir.serde.deserialize_tensor(proto)}

    def type_number(self, kind: str) -> int:
        """The number of an ONNX type, as Cast wants it."""
        return int(self._ir.DataType[kind])

    def finish(self, outputs: Sequence[str]) -> None:
        """Drop initializers that nobody reads; name the outputs, and give every value a name of its own."""
        initializers = self._graph.initializers
        for name, value in list(initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del initializers[name]
        taken = {value.name for value in self._graph.inputs} | set(initializers)
        for value, name in zip(self._graph.outputs, outputs, strict=True):
            if value.name not in taken:
                value.name = name
                taken.add(name)
        ends = list(self._graph.outputs)
        inner = [value for node in self._graph for value in node.outputs if value.name]
        _tell_apart([value for value in inner if not any(value is end for end in ends)], taken)
        _tell_apart([node for node in self._graph if node.name], set())


def _tell_apart(named: Sequence[Any], taken: set[str]) -> None:
    """Lengthen names that are taken."""
    for one in named:
        while one.name in taken:
            one.name += "_"
        taken.add(one.name)
