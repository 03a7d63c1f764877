"""Solvers: weight + scheme + statistics -> codes. Arrays in, QuantizedWeight out; no modules, no files."""
