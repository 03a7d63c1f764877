"""A quantized network, however it was made, as a verified directory."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from pennyweight.containers.onnx import Runtime
from pennyweight.evaluate.network.artefact import Extent, Writing, site_reports, write_artefact
from pennyweight.evaluate.network.described import edge_reports, hash_of, network_facts, network_notes, samples_in
from pennyweight.evaluate.network.record import NetworkRecipe, NetworkRecord
from pennyweight.models.network import QuantizedNetwork, batches_of
from pennyweight.pipeline.run import check_target

# Batches that the runtime's outputs are compared on.
BATCHES = 2


@dataclass(frozen=True)
class QuantizedModule:
    """module     computes in float with the decoded weights and rounded edges: a torch.fx graph, in eval mode
    quantized  the codes and parameters that were written
    record     what happened
    out        where the file is, None where none was asked for
    """

    module: fx.GraphModule
    quantized: QuantizedNetwork
    record: NetworkRecord
    out: Path | None = None


def save_module(
    quantized: QuantizedNetwork,
    out: str | Path,
    *,
    runtime: Runtime = "onnxruntime",
    calibration: Iterable[Any] | None = None,
    name: str = "network",
    verify: Extent = "full",
    seed: int = 0,
) -> QuantizedModule:
    """Write a quantized network, as pw.train.finish returns it, into the new directory `out`, verified in `runtime`.

    calibration  batches that the runtime's outputs are compared on too

    Raises UsageError where `out` cannot be, ContainerError for what the file cannot hold, VerificationError where the
    runtime computes something else; then `out` does not exist.
    """
    started, target = time.perf_counter(), check_target(out)
    network = quantized.network
    batches = [] if calibration is None else [batch.inputs for batch in batches_of(calibration, network, limit=BATCHES)]
    recipe = NetworkRecipe(
        None, None, runtime, "trained", (), (), None, None, seed, len(batches), samples_in(batches),
        hash_of(batches) if batches else None,
    )  # fmt: skip
    draft = NetworkRecord(
        recipe, network_facts(name, network), site_reports(quantized), edge_reports(quantized),
        kept=dict(quantized.plan.kept), refused=dict(network.refused), notes=network_notes(network),
    )  # fmt: skip
    record = write_artefact(
        quantized, target, draft, batches, Writing(runtime, verify, network, seed=seed, started=started)
    )
    return QuantizedModule(quantized.simulated(), quantized, record, target)
