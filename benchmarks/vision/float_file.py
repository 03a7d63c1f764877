"""The float network as the ONNX file that quantized files are compared with and that peers start from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.vision.problem import OUTPUT

# The first that has 4-bit integers.
OPSET = 21


def write_float(net: nn.Module, inputs: dict[str, Tensor], file: Path) -> None:
    """Export `net` with any batch to `file`; `inputs` are an example, in the order in which it takes them.

    What the exporter notes about the sources (paths, stack traces) is left out: it is no part of the network's size.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch = torch.export.Dim("batch")
    made = torch.onnx.export(
        net,
        tuple(inputs.values()),
        dynamo=True,
        dynamic_shapes=tuple({0: batch} for _ in inputs),
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=[OUTPUT],
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    _forget(model.graph.node, model.graph.value_info, model.graph.input, model.graph.output, [model, model.graph])
    file.write_bytes(model.SerializeToString())


def _forget(*parts: Sequence[object]) -> None:
    for part in parts:
        for one in part:
            del one.metadata_props[:]  # type: ignore[attr-defined]
            one.ClearField("doc_string")  # type: ignore[attr-defined]
