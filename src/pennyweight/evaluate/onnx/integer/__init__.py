"""ONNX Runtime's 8-bit arithmetic in plain numpy, bit for bit, and where a runtime departs from it.

ONNX Runtime decides by rules of its own which operations of a QDQ file become integer kernels. They depend on its
version, on the processor and on the whole graph, so they aren't guessed here: the session is asked for the graph that
it runs (`graph.py`), and that graph is simulated. Every result of a kernel is then ours, computed from the formulas
in the files of this folder, and none is the runtime's.
"""
