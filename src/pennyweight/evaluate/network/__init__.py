"""A network from memory to a verified ONNX file in one call, and such a file checked again."""
