"""ONNX files in the runtimes that read them: agreement with our own arithmetic, latency, memory."""
