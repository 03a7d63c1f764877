"""A container without a runtime: the decoded weights, so that any scheme can be judged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.common import STORAGE_NAME, write_storage
from pennyweight.containers.base import Container, ModelFacts
from pennyweight.core.errors import ContainerError
from pennyweight.models.base import Site, TensorInfo
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight, Scheme


@dataclass(frozen=True)
class Dense:
    """Takes every scheme; a site becomes SITE.weight, float32 [out, in].

    What the codes, scales and zero points would take goes to storage.json (`settle`), and sizes are counted from that.
    """

    @property
    def name(self) -> str:
        return "dense"

    @property
    def runtimes(self) -> tuple[str, ...]:
        return ()

    def why_not(self, scheme: Scheme, site: Site, *, runtime: str) -> str | None:
        return None

    def why_not_plan(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> str | None:
        return None

    def entries(self, site: Site, scheme: Scheme) -> Mapping[str, TensorInfo]:
        return {f"{site.name}.weight": TensorInfo(torch.float32, site.shape)}

    def encode(self, site: Site, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {f"{site.name}.weight": weight.dequantize(torch.float32)}

    def decode(self, site: Site, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        raise ContainerError(f"{site.name}: a dense artefact holds no codes: start the run afresh")

    def config(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> dict[str, Any]:
        """Bytes of every quantized weight; no runtime must read them, so `settle` moves them elsewhere."""
        shapes = {site.name: site.shape for site in sites}
        stored = {name: -(-scheme.storage_bits(shapes[name]) // 8) for name, scheme in plan.schemes.items()}
        return {f"{name}.weight": size_bytes for name, size_bytes in stored.items()}


def settle(artefact: Path) -> None:
    """Move what `Dense.config` said from config.json to storage.json: what is left is a plain float model."""
    config = json.loads((artefact / "config.json").read_text(encoding="utf-8"))
    write_storage(artefact, config.pop("quantization_config"))
    (artefact / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stored_bytes(artefact: Path) -> dict[str, int]:
    """What the decoded tensors of a dense artefact take packed, by name; empty for a packed artefact."""
    path = artefact / STORAGE_NAME
    found: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["bytes"] if path.exists() else {}
    return found


DENSE: Container = Dense()
