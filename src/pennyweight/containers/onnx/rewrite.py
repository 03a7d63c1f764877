"""Markers become operations on codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pennyweight.containers.onnx.bias import bias_codes
from pennyweight.containers.onnx.calls import Call, Written, bias_of
from pennyweight.containers.onnx.decode import Weights
from pennyweight.containers.onnx.dialect import Dialect
from pennyweight.containers.onnx.graph import Graph, Node, Value
from pennyweight.containers.onnx.stored import Array
from pennyweight.models.network.quantized import QuantizedNetwork

MICROSOFT = "com.microsoft"


class Rewriting:
    """One pass over the markers of an exported graph."""

    def __init__(
        self, graph: Graph, quantized: QuantizedNetwork, written: Mapping[str, Written], dialect: Dialect
    ) -> None:
        self.weights = Weights(graph, written, dialect)
        self._graph, self._quantized, self._written, self._dialect = graph, quantized, written, dialect
        self._calls = {call.node: call for site in written.values() for call in site.calls}
        self._parameters: dict[str, tuple[Value, Value]] = {}
        self._dynamic: dict[Value, tuple[Value, Value, Value]] = {}

    def run(self) -> None:
        rewrite = {
            "Edge": self._edge,
            "Weight": self._weight,
            "Bias": self._bias,
            "Linear": self._linear,
            "Embedding": self._embedding,
        }
        for node, kind, attributes in self._graph.markers():
            self._graph.replace(node, rewrite[kind](node, attributes))

    def _edge(self, node: Node, attributes: Mapping[str, Any]) -> Value:
        value = attributes["value"]
        scale, zero = self._edge_parameters(value)
        codes = self._graph.make("QuantizeLinear", [node.inputs[0], scale, zero], name=f"{value}.codes")
        return self._graph.make("DequantizeLinear", [codes, scale, zero], name=f"{value}.rounded")

    def _edge_parameters(self, value: str) -> tuple[Value, Value]:
        if value not in self._parameters:
            given = self._quantized.activations[value]
            kind = f"{'INT' if given.element.signed else 'UINT'}{given.element.bits}"
            data = bytes([given.zero & ((1 << given.element.bits) - 1)])
            scale = self._graph.tensor(f"{value}.scale", torch.tensor(given.scale), "FLOAT")
            self._parameters[value] = scale, self._graph.array(f"{value}.zero", Array(kind, (), data))
        return self._parameters[value]

    def _weight(self, node: Node, attributes: Mapping[str, Any]) -> Value:
        site = attributes["site"]
        if self._written[site].form == "integers":
            return self.weights.dequantized(site)
        return self.weights.decoded(site)

    def _bias(self, node: Node, attributes: Mapping[str, Any]) -> Value:
        return self._integer_bias(self._calls[attributes["node"]])

    def _integer_bias(self, call: Call) -> Value:
        """DequantizeLinear of int32 codes, with the scale s_x s_w, which is computed when a session is made."""
        assert call.edge is not None
        bias = bias_of(self._quantized.network.graph, call.target)
        assert bias is not None
        site = self._written[call.site.name]
        codes = bias_codes(bias, site.weight, self._quantized.activations[call.edge])
        scales = self.weights.arrays(call.site.name)["scales"]
        made = self._graph.make("Mul", [self._edge_parameters(call.edge)[0], scales], name=f"{call.node}.bias.scales")
        stored = self._graph.tensor(f"{call.node}.bias.codes", codes, "INT32")
        return self._graph.make("DequantizeLinear", [stored, made], name=f"{call.node}.bias", attributes={"axis": 0})

    def _linear(self, node: Node, attributes: Mapping[str, Any]) -> Value:
        x, _, *biases = node.inputs
        call = self._calls[attributes["node"]]
        bias = biases[0] if biases else None
        match self._written[call.site.name].form:
            case "blocks":
                return self._blocks_product(call, x, bias)
            case "decoded":
                return self._decoded_product(call, x, bias, attributes["rank"])
        if call.activation is not None and call.activation.is_dynamic:
            return self._dynamic_product(call, x, bias)
        return self._static_product(call, x, bias, attributes["rank"])

    def _static_product(self, call: Call, x: Value, bias: Value | None, rank: int) -> Value:
        """Gemm for matrices, MatMul and Add for more axes: what ONNX Runtime fuses."""
        site = call.site.name
        if rank != 2:
            w = self.weights.dequantized(site, is_transposed=True, has_zeros=True)
            return self._plus(self._graph.make("MatMul", [x, w], name=f"{call.node}.product"), bias, call)
        w = self.weights.dequantized(site, has_zeros=True)
        inputs = [x, w, *([] if bias is None else [self._integer_bias(call)])]
        return self._graph.make("Gemm", inputs, name=call.node, attributes={"transB": 1})

    def _plus(self, product: Value, bias: Value | None, call: Call) -> Value:
        return product if bias is None else self._graph.make("Add", [product, bias], name=call.node)

    def _dynamic_product(self, call: Call, x: Value, bias: Value | None) -> Value:
        """float(x_q w_q) (s_x s_w) + b: what ONNX Runtime fuses to DynamicQuantizeMatMul or MatMulIntegerToFloat."""
        graph, site = self._graph, call.site.name
        if x not in self._dynamic:
            name = f"{call.edge}.dynamic"
            self._dynamic[x] = graph.make("DynamicQuantizeLinear", [x], name=name, outputs=3)
        codes, scale, zero = self._dynamic[x]
        w, zeros = self.weights.integers(site, is_transposed=True), self.weights.integer_zeros(site, is_needed=False)
        inputs = [codes, w, zero, *([] if zeros is None else [zeros])]
        whole = graph.make("MatMulInteger", inputs, name=f"{call.node}.whole")
        product = graph.make("Cast", [whole], name=f"{call.node}.float", attributes={"to": graph.type_number("FLOAT")})
        scales = graph.make("Mul", [scale, self.weights.arrays(site)["scales"]], name=f"{call.node}.scales")
        return self._plus(graph.make("Mul", [product, scales], name=f"{call.node}.product"), bias, call)

    def _blocks_product(self, call: Call, x: Value, bias: Value | None) -> Value:
        written = self._written[call.site.name]
        stored = written.stored
        assert stored.block is not None
        parts = self.weights.blocks(call.site.name, is_rows=False)
        inputs = [x, parts["codes"], parts["scales"], parts.get("zeros")]
        if bias is not None:
            inputs += [None, bias]
        while inputs[-1] is None:
            inputs.pop()
        outputs, width = call.site.matrix_shape
        attributes = {
            "K": width, "N": outputs, "bits": stored.bits, "block_size": stored.block,
            "accuracy_level": written.accuracy_level(self._dialect),
        }  # fmt: skip
        return self._graph.make("MatMulNBits", inputs, name=call.node, domain=MICROSOFT, attributes=attributes)

    def _decoded_product(self, call: Call, x: Value, bias: Value | None, rank: int) -> Value:
        graph, site = self._graph, call.site.name
        if not self._written[site].stored.is_spread:
            w = self.weights.decoded_for_product(site)
            if call.activation is not None:
                # Groups and what is too large for int32 are no product of integers.
                x = graph.make("Max", [x], name=f"{call.node}.guarded")
            return self._plus(graph.make("MatMul", [x, w], name=f"{call.node}.product"), bias, call)
        w = self.weights.decoded(site)
        if rank == 2:
            inputs = [x, w, *([] if bias is None else [bias])]
            return graph.make("Gemm", inputs, name=call.node, attributes={"transB": 1})
        turned = graph.make("Transpose", [w], name=f"{call.node}.turned", attributes={"perm": [1, 0]})
        return self._plus(graph.make("MatMul", [x, turned], name=f"{call.node}.product"), bias, call)

    def _embedding(self, node: Node, attributes: Mapping[str, Any]) -> Value:
        site, indices = attributes["site"], node.inputs[0]
        stored = self._written[site].stored
        if stored.block is None:
            return self._graph.make("Gather", [self.weights.decoded(site), indices], name=f"{site}.rows")
        parts = self.weights.blocks(site, is_rows=True)
        inputs = [parts["codes"], indices, parts["scales"], *([parts["zeros"]] if "zeros" in parts else [])]
        given = {"gather_axis": 0, "quantize_axis": 1, "block_size": stored.block, "bits": stored.bits}
        return self._graph.make("GatherBlockQuantized", inputs, name=f"{site}.rows", domain=MICROSOFT, attributes=given)
