"""A quantized network as a directory: written, opened in its runtime, compared, timed, described."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import fx

from pennyweight.containers.onnx import OnnxReport, Runtime, write_float_onnx, write_onnx
from pennyweight.core.errors import BudgetError
from pennyweight.core.version import versions
from pennyweight.evaluate.network.card import network_card
from pennyweight.evaluate.network.directory import CHECK, MODEL, appearing, hashes_of, write_check, write_texts
from pennyweight.evaluate.network.example import sample_like
from pennyweight.evaluate.network.integers import has_integers, integer_agreement
from pennyweight.evaluate.network.record import NetworkRecord, SiteReport, bits_per_weight
from pennyweight.evaluate.onnx.agreement import RuntimeAgreement, agreement
from pennyweight.evaluate.onnx.bounds import allowed_errors, outputs_of
from pennyweight.evaluate.onnx.latency import latency
from pennyweight.evaluate.onnx.runtime import argument_tensors, arrays_of
from pennyweight.models.network.network import Inputs, Network
from pennyweight.models.network.quantized import QuantizedNetwork

Extent = Literal["full", "none"]
_PARTS = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Writing:
    """How an artefact is written.

    runtime     that reads the file
    extent      "full": it is opened there and its outputs compared with ours; "none"
    original    the float network that latency and size are compared with: batch norms folded
    seconds     that the comparison of latencies may take
    seed        of the sample that goes into the directory
    started     when the run began, on the clock of time.perf_counter
    most_bytes  that the file may take, None for any
    """

    runtime: Runtime
    extent: Extent
    original: Network
    seconds: float = 2.0
    seed: int = 0
    started: float = field(default_factory=time.perf_counter)
    most_bytes: int | None = None


def write_artefact(
    quantized: QuantizedNetwork, target: Path, draft: NetworkRecord, batches: Sequence[Inputs], writing: Writing
) -> NetworkRecord:
    """Write the directory `target`, which appears whole and verified or not at all, and return `draft` completed.

    Outputs are compared on `batches` too. Raises ContainerError for what the file cannot hold, VerificationError where
    the runtime computes something else.
    """
    with appearing(target) as work, tempfile.TemporaryDirectory(dir=target.parent, prefix=".float.") as scratch:
        report = write_onnx(quantized, work / MODEL, runtime=writing.runtime)
        if writing.most_bytes is not None and report.file_bytes > writing.most_bytes:
            raise BudgetError(writing.most_bytes, report.file_bytes, "give the plan a little less")
        before = write_float_onnx(writing.original, Path(scratch) / MODEL)
        record = _described(draft, quantized, report, before.file_bytes)
        module = quantized.simulated()
        sample = sample_like(quantized.network, seed=writing.seed)
        allowed = allowed_errors(quantized, module, [sample], blocks=report.blocks)
        write_check(work / CHECK, argument_tensors(quantized.network, sample), outputs_of(module, sample), allowed)
        if writing.extent == "full":
            verification = _verified(
                work / MODEL, quantized, module, [sample, *batches], report.blocks, writing.runtime
            )
            feed = arrays_of(quantized.network, quantized.network.example)
            times = latency(Path(scratch) / MODEL, work / MODEL, feed, runtime=writing.runtime, seconds=writing.seconds)
            integers = None
            if has_integers(quantized, writing.runtime):
                integers = integer_agreement(work / MODEL, arrays_of(quantized.network, sample))
            record = replace(record, verification=(verification,), latency=(times,), integers=integers)
        seconds = time.perf_counter() - writing.started
        record = replace(record, outputs=hashes_of(work), seconds=round(seconds, 3))
        write_texts(work, record=record.lasting(), run=record.measured(), card=network_card(record))
    return record


def _verified(
    path: Path, quantized: QuantizedNetwork, module: fx.GraphModule, batches: Sequence[Inputs],
    blocks: Mapping[str, int], runtime: Runtime,
) -> RuntimeAgreement:  # fmt: skip
    feeds = [arrays_of(quantized.network, batch) for batch in batches]
    ours = [outputs_of(module, batch) for batch in batches]
    allowed = allowed_errors(quantized, module, batches, blocks=blocks)
    found = agreement(path, feeds, ours, allowed, runtime=runtime)
    found.check(path)
    return found


def _described(
    draft: NetworkRecord, quantized: QuantizedNetwork, report: OnnxReport, float_bytes: int
) -> NetworkRecord:
    """`draft` with what the file turned out to be."""
    sites = tuple(
        replace(site, size_bytes=report.sizes.get(site.name), form=report.forms.get(site.name)) for site in draft.sites
    )
    weights = sum(quantized.weights[site.name].codes.numel() for site in draft.sites)
    sizes: dict[str, Any] = {
        "file_bytes": report.file_bytes,
        "float_file_bytes": float_bytes,
        "site_bytes": sum(report.sizes.values()),
        "bpw_sites": bits_per_weight(sites, weights),
    }
    return replace(
        draft,
        sites=sites,
        sizes={**draft.sizes, **sizes},
        notes=(*draft.notes, *report.notes),
        versions=versions(_PARTS),
    )


def site_reports(quantized: QuantizedNetwork) -> tuple[SiteReport, ...]:
    """What can be said of each quantized site without having seen how it was made."""
    sites = [site for site in quantized.network.sites if site.name in quantized.weights]
    return tuple(
        SiteReport(site.name, site.kind, site.shape, quantized.weights[site.name].scheme.name) for site in sites
    )
