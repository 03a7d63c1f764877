"""Operations in float between rounded values, guarded against ONNX Runtime.

Where a convolution or a product of matrices reads what DequantizeLinear gives and QuantizeLinear reads its result, ONNX
Runtime rounds float weights and biases to integers of its own making, without a word (WeightBiasQuantization). Max of a
single value is that value, and hides where it comes from.
"""

from __future__ import annotations

from pennyweight.containers.onnx.graph import Graph, Value

_GUARDED = frozenset({"Conv", "ConvTranspose", "Gemm"})
# Through these ONNX Runtime moves DequantizeLinear forward.
_MOVES = frozenset(
    {
        "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "MaxPool", "Pad", "Expand",
        "Identity", "Resize", "Gather", "Concat",
    }
)  # fmt: skip


def guard(graph: Graph) -> list[str]:
    """Put Max between; returns the names of the operations."""
    guarded = []
    for node in graph.nodes():
        if node.op_type not in _GUARDED or not _is_rounded(node.inputs[0]):
            continue
        # What is all integers is meant to be fused.
        if all(value is None or _is_dequantized(value) for value in node.inputs[1:]):
            continue
        graph.before(node)
        name = str(node.outputs[0].name)
        node.replace_input_with(0, graph.make("Max", [node.inputs[0]], name=f"{name}.guarded"))
        guarded.append(name)
    return guarded


def _is_dequantized(value: Value) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type == "DequantizeLinear"


def _is_rounded(value: Value) -> bool:
    """Whether the numbers come from DequantizeLinear and were only moved."""
    maker = value.producer()
    while maker is not None and maker.op_type in _MOVES:
        maker = maker.inputs[0].producer()
    return maker is not None and maker.op_type == "DequantizeLinear"
