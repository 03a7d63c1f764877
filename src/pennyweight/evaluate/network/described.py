"""What a record says of a network, its calibration data, its edges."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pennyweight.evaluate.network.record import EdgeReport, NetworkRecipe, NetworkRecord, SiteReport
from pennyweight.models.network.network import Inputs, Network
from pennyweight.models.network.quantized import QuantizedNetwork
from pennyweight.pipeline.network.activations import EdgeRecord
from pennyweight.pipeline.network.options import NetworkOptions
from pennyweight.pipeline.network.quantize import NetworkResult


def network_facts(name: str, network: Network) -> dict[str, Any]:
    """Its name, what it takes, how many weights it has."""
    targets = {node.name: str(node.target) for node in network.graph.graph.nodes if node.op == "placeholder"}
    inputs = {
        targets[name]: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        for name, value in network.input_values.items()
    }
    parameters = sum(parameter.numel() for parameter in network.graph.parameters())
    return {"name": name, "inputs": inputs, "parameters": parameters, "batch_varies": network.batch_varies}


def network_notes(network: Network) -> tuple[str, ...]:
    """What its user should know of the graph."""
    if network.batch_varies:
        return ()
    return ("the network allows no other batch size than that of the example: it is written down in its code",)


def hash_of(batches: Sequence[Inputs]) -> str:
    """SHA-256 of all tensors, their types and shapes."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in batch.tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def samples_in(batches: Sequence[Inputs]) -> int:
    return sum(next((len(tensor) for tensor in batch.tensors if tensor.dim()), 1) for batch in batches)


def edge_reports(quantized: QuantizedNetwork) -> tuple[EdgeReport, ...]:
    """Every rounded value with what its codes hold."""
    found = []
    for name, scheme in quantized.plan.edges.items():
        known = quantized.activations.get(name)
        if known is None:
            found.append(EdgeReport(name, scheme.name, why="the range of each tensor as it passes"))
        else:
            found.append(EdgeReport(name, scheme.name, known.scale, known.zero, known.low, known.high))
    return tuple(found)


def _with_reason(edge: EdgeReport, known: EdgeRecord | None) -> EdgeReport:
    if known is None:
        return edge
    return replace(edge, why=known.chooser, seen=(known.low, known.high), clipped=known.clipped)


def draft_of(
    name: str, network: Network, batches: Sequence[Inputs], options: NetworkOptions, budget: str | None,
    result: NetworkResult,
) -> NetworkRecord:  # fmt: skip
    """The record of a result that is in memory still."""
    quantized = result.quantized
    recipe = NetworkRecipe(
        None if budget else options.scheme, budget, options.runtime, options.effort, options.keep, options.at,
        options.ranges, options.equalize, options.seed, len(batches), samples_in(batches),
        hash_of(batches) if batches else None,
    )  # fmt: skip
    changed = {site: (reason,) for site, reason in quantized.plan.changed.items()}
    noted = {site: record.notes for site, record in result.sites.items() if record.notes}
    return NetworkRecord(
        recipe,
        network_facts(name, network),
        tuple(
            _site_report(quantized, result, site.name)
            for site in quantized.network.sites
            if site.name in quantized.weights
        ),
        tuple(_with_reason(edge, result.edges.get(edge.name)) for edge in edge_reports(quantized)),
        kept=dict(quantized.plan.kept),
        refused=dict(network.refused),
        fallbacks={site: (*changed.get(site, ()), *noted.get(site, ())) for site in {**changed, **noted}},
        notes=(*network_notes(network), *result.notes),
    )


def _site_report(quantized: QuantizedNetwork, result: NetworkResult, name: str) -> SiteReport:
    site, known = quantized.network.site(name), result.sites.get(name)
    scheme = quantized.weights[name].scheme.name
    if known is None:
        return SiteReport(name, site.kind, site.shape, scheme)
    return SiteReport(
        name, site.kind, site.shape, scheme, known.error, known.error_nearest, known.output_error, known.bias_shift,
        notes=known.notes,
    )  # fmt: skip
