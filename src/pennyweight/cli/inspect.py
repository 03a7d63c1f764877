"""`pennyweight inspect`: what is in a model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pennyweight.cli.console import Bar, mebibytes, put_json, table
from pennyweight.cli.inspect_network import print_network

if TYPE_CHECKING:
    from pennyweight.evaluate.gguf_inventory import GgufInventory, TensorFacts
    from pennyweight.evaluate.inventory import Inventory, SiteFacts


def inspect(
    model: str | None = typer.Argument(None, help="Model directory, Hub id, GGUF file or quantized network."),
    cpu: bool = typer.Option(False, "--cpu", help="Print what this machine's processor offers, and nothing else."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Run code that the model brings along."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Sites, shapes, sizes and outliers of a model."""
    from pennyweight.core.errors import UsageError
    from pennyweight.evaluate.gguf_inventory import gguf_inventory
    from pennyweight.evaluate.inventory import inventory
    from pennyweight.evaluate.network.directory import is_network_artefact
    from pennyweight.evaluate.network.inventory import network_inventory
    from pennyweight.models.gguf_files import gguf_of

    if cpu:
        _print_cpu(as_json=as_json)
        return
    if model is None:
        raise UsageError("name a model: pennyweight inspect MODEL")
    path = Path(model)
    if is_network_artefact(path):
        network = network_inventory(path)
        put_json(asdict(network)) if as_json else print_network(network)
        return
    first = None if (path / "config.json").is_file() else gguf_of(path)
    if first is not None:
        file = gguf_inventory(first)
        put_json(asdict(file)) if as_json else _print_file(file)
        return
    found = inventory(model, trust_remote_code=trust_remote_code, tell=Bar("weights").show)
    put_json(asdict(found)) if as_json else _print(found)


def _print_cpu(*, as_json: bool) -> None:
    from pennyweight.kernels.native import native

    module = native()
    sets = list(module.instruction_sets()) if module is not None else []
    kernels = "native" if module is not None else "torch (the native part is not installed)"
    if as_json:
        put_json({"kernels": kernels, "instruction_sets": sets})
    else:
        print(f"kernels: {kernels}\ninstruction sets: {', '.join(sets) or 'unknown'}")


def _print(found: Inventory) -> None:
    size = mebibytes(found.size_bytes)
    print(f"{found.path}: {found.model_class}, {found.blocks} blocks, {found.weights:,} weights, {size}")
    if found.decoded_from:
        print(f"  already quantized, decoded on reading: {found.decoded_from}")
    kinds: dict[str, list[SiteFacts]] = {}
    for site in found.sites:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site.name), []).append(site)
    rows = [_row(name, sites) for name, sites in kinds.items()]
    table(["sites", "count", "out x in", "weights", "stored as", "std", "largest", "largest/std"], rows)
    print(f"outside the sites: {found.other_weights:,} weights (embeddings, norms)")
    for name, scheme in found.other_codes.items():
        print(f"  {name} is stored as {scheme}")
    for site in found.sites:
        if site.kind == "head":
            print(f"the output head, {site.name}, stays in float too unless it is given a scheme of its own (--at)")
    for name, reason in found.refused.items():
        print(f"  not a site: {name}: {reason}")


def _print_file(found: GgufInventory) -> None:
    parts = f" in {len(found.files)} files" if len(found.files) > 1 else ""
    size = mebibytes(found.size_bytes)
    kind = found.architecture or "no model"
    print(f"{found.files[0]}: {kind}, {found.weights:,} weights, {size}{parts}, {len(found.fields)} fields")
    kinds: dict[tuple[str, str, str], list[TensorFacts]] = {}
    for one in found.tensors:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", one.name)
        kinds.setdefault((name, one.type, " x ".join(map(str, one.shape))), []).append(one)
    rows = [
        [name, str(len(some)), shape, kind, mebibytes(sum(one.size_bytes for one in some))]
        for (name, kind, shape), some in kinds.items()
    ]
    table(["tensors", "count", "shape", "type", "size"], rows)
    types = Counter({one.type: 0 for one in found.tensors})
    for one in found.tensors:
        types[one.type] += one.size_bytes
    print(", ".join(f"{kind} {mebibytes(size)}" for kind, size in types.most_common()))


def _row(name: str, sites: list[SiteFacts]) -> list[str]:
    shapes = sorted({f"{site.shape[0]} x {site.shape[1]}" for site in sites})
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    std = sum(site.std for site in sites) / len(sites)
    largest = max(site.largest for site in sites)
    outlier = max(site.largest / site.std if site.std else 0.0 for site in sites)
    kinds = ", ".join(dict.fromkeys(site.stored_as for site in sites))
    return [
        name,
        str(len(sites)),
        ", ".join(shapes),
        f"{weights:,}",
        kinds,
        f"{std:.3g}",
        f"{largest:.3g}",
        f"{outlier:.1f}",
    ]
