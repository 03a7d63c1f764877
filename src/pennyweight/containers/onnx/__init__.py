"""Networks as ONNX files: integers as ONNX Runtime and OpenVINO read them."""

from pennyweight.containers.onnx.dialect import Runtime
from pennyweight.containers.onnx.edges import Edge, edges_of
from pennyweight.containers.onnx.read import read_onnx
from pennyweight.containers.onnx.report import OnnxReport
from pennyweight.containers.onnx.rules import size_bytes, why_not, why_not_activation
from pennyweight.containers.onnx.write import write_float_onnx, write_onnx

__all__ = [
    "Edge",
    "OnnxReport",
    "Runtime",
    "edges_of",
    "read_onnx",
    "size_bytes",
    "why_not",
    "why_not_activation",
    "write_float_onnx",
    "write_onnx",
]
