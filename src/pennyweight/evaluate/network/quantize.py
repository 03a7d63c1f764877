"""The one call: any torch module -> codes, a simulated module, and a verified ONNX file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pennyweight.containers.onnx import Runtime
from pennyweight.core.errors import DataError, UsageError
from pennyweight.evaluate.network.artefact import Extent, Writing, write_artefact
from pennyweight.evaluate.network.budgets import NetworkBudget, result_within
from pennyweight.evaluate.network.described import draft_of
from pennyweight.evaluate.network.example import example_in
from pennyweight.evaluate.network.saved import BATCHES, QuantizedModule
from pennyweight.models.network import Network, batches_of, capture, fold_batch_norms
from pennyweight.models.network.network import Inputs
from pennyweight.pipeline.effort import Effort
from pennyweight.pipeline.network.options import NetworkOptions
from pennyweight.pipeline.network.quantize import Tell, tell_nobody
from pennyweight.pipeline.run import check_target

# Calibration samples that are looked at: a loader of a whole training set is read no further.
SAMPLES = 1024
# Of the weights and of the values between them where there are data, else of the weights alone.
WITH_DATA, WITHOUT_DATA = "w8a8-channel", "int8-channel"


def quantize_module(
    net: nn.Module,
    *,
    scheme: str | None = None,
    calibration: Iterable[Any] | None = None,
    out: str | Path | None = None,
    runtime: Runtime = "onnxruntime",
    effort: Effort = "normal",
    size: str | int | None = None,
    bpw: float | None = None,
    max_loss: float | None = None,
    evaluate: Iterable[Any] | Callable[[Any], Any] | None = None,
    keep: Sequence[str] = (),
    at: Sequence[str] = (),
    example: Any = None,
    ranges: str | None = None,
    equalize: bool | None = None,
    verify: Extent = "full",
    seed: int = 0,
    tell: Tell = tell_nobody,
) -> QuantizedModule:
    """Quantize any torch module, and with `out` write it into that new directory, verified in `runtime`.

    scheme       "w8a8-channel", "w4a8-channel", "w8a8-channel-dynamic", weights alone "int4-g32"; with a budget its
                 activations count. calibration: batches (tensors, tuples, mappings), of which 1,024 samples are read
    size, bpw    what the file, or its tensors a weight, may take. max_loss: points of accuracy that may be lost, as
                 `evaluate` has it: a loader of labelled batches, or a function of a module that gives per cent
    keep, at     globs of sites that stay in float; "GLOB=SCHEME". example: inputs, where calibration gives none
    ranges       what chooses ranges of activations. equalize: whether weights are equalized across layers first

    Raises PennyweightError, which names the site, node or batch, and then `out` does not exist.
    """
    started, target = time.perf_counter(), None if out is None else check_target(out)
    budget = NetworkBudget.of(size=size, bpw=bpw, max_loss=max_loss, evaluate=evaluate)
    network, batches = captured(net, calibration, example)
    options = NetworkOptions(
        scheme=scheme or (WITH_DATA if batches else WITHOUT_DATA), keep=tuple(keep), at=tuple(at), effort=effort,
        ranges=ranges or NetworkOptions.ranges, equalize=equalize, runtime=runtime, seed=seed,
    )  # fmt: skip
    result, trials = result_within(network, batches, options, budget, tell)
    record = replace(
        draft_of(type(net).__name__, network, batches, options, budget.name, result),
        trials=trials, seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    if target is not None:
        writing = Writing(
            runtime, verify, fold_batch_norms(network), seed=seed, started=started, most_bytes=budget.most_bytes
        )
        record = write_artefact(result.quantized, target, record, batches[:BATCHES], writing)
    return QuantizedModule(result.quantized.simulated(), result.quantized, record, target)


def captured(net: nn.Module, calibration: Iterable[Any] | None, example: Any) -> tuple[Network, list[Inputs]]:
    """The graph of `net`, and the checked batches that calibrate it; raises DataError where neither gives inputs."""
    if isinstance(calibration, str):
        raise UsageError(f"calibration={calibration!r}: give a loader of batches, as the network takes them")
    given = [] if calibration is None else _some(calibration)
    if example is None and not given:
        raise DataError("nothing to run the network on: give calibration (a loader that yields batches) or example")
    network = capture(net, example_in(net, given[0]) if example is None else example)
    return network, [batch.inputs for batch in batches_of(given, network)] if calibration is not None else []


def _some(loader: Iterable[Any]) -> list[Any]:
    """Its first batches, SAMPLES samples or a little more."""
    found: list[Any] = []
    samples = 0
    for batch in loader:
        found.append(batch)
        parts = list(batch.values()) if isinstance(batch, Mapping) else batch
        first = parts[0] if isinstance(parts, list | tuple) and parts else parts
        samples += len(first) if hasattr(first, "__len__") else 1
        if samples >= SAMPLES:
            break
    if not found:
        raise DataError("calibration yields nothing: give a loader with one batch or more")
    return found
