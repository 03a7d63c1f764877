"""Networks as ONNX files: integers as ONNX Runtime and OpenVINO read them."""

from pennyweight.containers.onnx.edges import Edge, edges_of

__all__ = ["Edge", "edges_of"]
