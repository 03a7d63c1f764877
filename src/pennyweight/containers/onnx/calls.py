"""What the nodes that compute with quantized weights read, and so in which form each weight lies in the file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from pennyweight.containers.onnx.bias import fits, with_scales_for_bias
from pennyweight.containers.onnx.dialect import Dialect
from pennyweight.containers.onnx.edges import end_of
from pennyweight.containers.onnx.rules import Form, block_of, has_integers, stored_as
from pennyweight.containers.onnx.stored import Stored
from pennyweight.models.network.identity import value_read
from pennyweight.models.network.network import NetworkSite, NetworkSiteKind
from pennyweight.models.network.quantized import QuantizedNetwork
from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.activation import UINT8, ActivationParameters, ActivationScheme

_WIDEST = ActivationParameters(1.0, 0, UINT8)


@dataclass(frozen=True)
class Call:
    """node    name of a node that computes with the site
    kind    what it does: another thing than `site.kind` where an embedding and a linear map share a weight
    target  path of the module that it calls; of an LSTM or GRU nothing
    edge    the value that it reads, if that is rounded
    """

    site: NetworkSite
    node: str
    kind: NetworkSiteKind
    target: str
    edge: str | None = None
    activation: ActivationScheme | None = None


@dataclass(frozen=True)
class Written:
    """A site as it is written.

    is_too_large  whether a bias or a sum leaves int32, so that the site computes in float
    """

    form: Form
    stored: Stored
    weight: QuantizedWeight
    calls: tuple[Call, ...]
    is_too_large: bool = False

    def accuracy_level(self, dialect: Dialect) -> int:
        """Of MatMulNBits: what an edge has rounded is not rounded again."""
        return 0 if any(call.activation is not None for call in self.calls) else dialect.accuracy_level

    def input_block(self, dialect: Dialect) -> int | None:
        """Numbers of the input of MatMulNBits that it rounds to 8 bits together, None where it rounds none. With float
        zero points it never does."""
        is_product = self.form == "blocks" and self.stored.site.kind == "linear" and dialect.runtime == "onnxruntime"
        has_level = self.accuracy_level(dialect) == 4 and not self.stored.has_float_zeros
        return self.stored.block if is_product and has_level else None


def written_sites(quantized: QuantizedNetwork, dialect: Dialect) -> dict[str, Written]:
    """Every quantized site, by name."""
    return {
        site.name: _written(quantized, site, quantized.weights[site.name], dialect)
        for site in quantized.network.sites
        if site.name in quantized.weights
    }


def _written(quantized: QuantizedNetwork, site: NetworkSite, weight: QuantizedWeight, dialect: Dialect) -> Written:
    nodes = {node.name: node for node in quantized.network.graph.graph.nodes}
    calls = tuple(_call(quantized, site, nodes[name]) for name in site.nodes)
    form, scheme = "decoded", weight.scheme
    can = [
        has_integers(call.kind, scheme, call.activation) and _ends_in_an_edge(call, nodes[call.node], quantized)
        for call in calls
    ]
    is_too_large = False
    if all(can):
        weight, is_too_large = _beside_bias(quantized, calls, weight)
        form = "decoded" if is_too_large else "integers"
    elif not any(can) and block_of(site, scheme, dialect) is not None:
        form = "blocks"
    return Written(form, stored_as(site, scheme, form, dialect), weight, calls, is_too_large)  # type: ignore[arg-type]


def _call(quantized: QuantizedNetwork, site: NetworkSite, node: fx.Node) -> Call:
    kind, target = site.kind, ""
    if node.op == "call_module":
        target = str(node.target)
        module = quantized.network.graph.get_submodule(target)
        kind = "embedding" if isinstance(module, nn.Embedding) else "linear" if isinstance(module, nn.Linear) else kind
    edge = value_read(node)
    scheme = quantized.plan.edges.get(edge)
    return Call(site, node.name, kind, target, None if scheme is None else edge, scheme)


def _ends_in_an_edge(call: Call, node: fx.Node, quantized: QuantizedNetwork) -> bool:
    """ONNX Runtime has products of integers that give floats for linear maps only."""
    end = quantized.plan.edges.get(end_of(node).name)
    return call.kind == "linear" or (end is not None and not end.is_dynamic)


def _beside_bias(
    quantized: QuantizedNetwork, calls: tuple[Call, ...], weight: QuantizedWeight
) -> tuple[QuantizedWeight, bool]:
    """`weight`, ready for the biases of its calls, and whether one of them leaves int32."""
    inputs = [
        (bias_of(quantized.network.graph, call.target), quantized.activations[call.edge])
        for call in calls
        if call.edge is not None and call.edge in quantized.activations
    ]
    if inputs:
        bias, x = max(inputs, key=lambda one: one[1].scale)
        weight = with_scales_for_bias(weight, bias, x.scale)
    # A dynamic range may have its zero point at either end; the bias is added in float.
    inputs += [(None, _WIDEST)] * (len(inputs) < len(calls))
    return weight, not all(fits(bias, weight, x) for bias, x in inputs)


def bias_of(graph: fx.GraphModule, target: str) -> Tensor | None:
    """That of the module `target`."""
    bias = getattr(graph.get_submodule(target), "bias", None)
    return bias if isinstance(bias, Tensor) else None
