"""Quantize a problem of the vision benchmark with one of the tools that people use; see benchmarks/peers/common.py.

    python -m benchmarks.peers.vision.run PROBLEM OUT --tool onnxruntime --method minmax --scheme w8a8-channel

Writes OUT/outputs.npy, float32 [n, width], what the result makes of the judged inputs in its own runtime, and
OUT/model.onnx where the tool can write one.
"""

from __future__ import annotations

from benchmarks.peers import common  # isort: skip - sets the environment before any library is imported

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.vision.schemes import NetworkScheme
from benchmarks.vision.problem import OUTPUTS_FILE, Problem

# Tool -> what its results depend on.
PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "nncf": ("nncf", "onnxruntime", "onnx"),
    "torchao": ("torchao", "torch"),
}


def quantize(arguments: argparse.Namespace, clock: common.Clock) -> dict[str, Any]:
    """Run the tool, then what it made."""
    with clock.phase("import"):
        tool = importlib.import_module(f"benchmarks.peers.vision.{arguments.tool}_tools")
    problem = Problem(arguments.problem)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with clock.phase("quantize"):
        run = tool.quantize(problem, arguments.out, method=arguments.method, scheme=arguments.scheme)
    with clock.phase("judge"):
        np.save(arguments.out / OUTPUTS_FILE, problem.outputs(run))
    return {}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("problem", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tool", choices=tuple(PACKAGES), required=True)
    parser.add_argument("--method", required=True, help="see the module of the tool")
    parser.add_argument("--scheme", type=NetworkScheme.parse, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    asked = parse_arguments()
    common.answer(asked, quantize, PACKAGES[asked.tool])
