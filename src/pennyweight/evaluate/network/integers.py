"""ONNX Runtime's integers against our own simulation of them, bit for bit, on the sample of an artefact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pennyweight.core.errors import PennyweightError
from pennyweight.evaluate.onnx.integer.agreement import compare_layers
from pennyweight.evaluate.onnx.runtime import Array
from pennyweight.models.network.quantized import QuantizedNetwork


@dataclass(frozen=True)
class IntegerAgreement:
    """elements, mismatches  output numbers that were compared, and that differ
    first          layer that differs when it gets the runtime's own inputs, and by how much, None where none does
    not_simulated  layers that compute in float: the runtime's own results were taken for them
    failed         why nothing could be compared
    """

    elements: int = 0
    mismatches: int = 0
    first: str | None = None
    not_simulated: tuple[str, ...] = ()
    failed: str | None = None


def has_integers(quantized: QuantizedNetwork, runtime: str) -> bool:
    """Whether the file has static edges of 8 bits, between which ONNX Runtime computes with integers."""
    return runtime == "onnxruntime" and bool(quantized.activations)


def integer_agreement(path: Path, feed: Mapping[str, Array]) -> IntegerAgreement:
    """Compare all layers of the file at `path` on one batch; where the simulation cannot say, it says why."""
    try:
        found = compare_layers(path, feed)
    except PennyweightError as error:
        return IntegerAgreement(failed=str(error))
    first = found.first
    return IntegerAgreement(
        found.elements,
        found.mismatches,
        None
        if first is None
        else f"{first.node} ({first.op}): {first.alone.mismatches} of {first.alone.elements} values",
        tuple(layer.node for layer in found.not_simulated),
    )
