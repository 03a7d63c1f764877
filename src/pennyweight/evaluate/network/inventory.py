"""What is in the directory of a quantized network, from its record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pennyweight.core.errors import ModelError
from pennyweight.evaluate.network.directory import RECORD


@dataclass(frozen=True)
class NetworkInventory:
    """inputs: name -> type and shape, None for axes that may vary. sites, edges, kept: as in the record. weights: how
    many the sites have. size_bytes: of all files of the model."""

    path: str
    name: str
    runtime: str
    verified: str
    size_bytes: int
    weights: int
    inputs: Mapping[str, Any]
    sites: list[dict[str, Any]]
    edges: list[dict[str, Any]]
    kept: Mapping[str, str]
    notes: list[str]


def network_inventory(directory: Path) -> NetworkInventory:
    """Raises ModelError for a directory without the record of a network."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        sites = record["sites"]
        return NetworkInventory(
            path=str(directory),
            name=record["network"]["name"],
            runtime=record["recipe"]["runtime"],
            verified=record["verified"],
            size_bytes=int(record["sizes"]["file_bytes"]),
            weights=sum(prod(site["shape"]) for site in sites),
            inputs=record["network"]["inputs"],
            sites=sites,
            edges=record["edges"],
            kept=record["kept"],
            notes=record["notes"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{directory / RECORD} is missing or damaged ({error}): name a directory that quantize_module wrote"
        ) from error
