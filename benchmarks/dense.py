"""A container without a runtime: the decoded weights, so that any scheme can be judged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.peers.common import STORAGE_NAME, write_storage
from pennyweight.containers.base import Container, ModelFacts
from pennyweight.models.base import Site, TensorInfo
from pennyweight.plan.plan import Plan
from pennyweight.schemes import QuantizedWeight, Scheme, fit_scales
from pennyweight.schemes.parameters import Parameters


@dataclass(frozen=True)
class Dense(Container):
    """Takes every scheme; a site becomes SITE.weight, float32 [out, in]; codes and parameters stay until `settle`.

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
        parameters = fit_scales(torch.zeros(site.shape), scheme, fit="minmax")
        held = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in _parts(parameters).items()}
        entries = {
            "weight": TensorInfo(torch.float32, site.shape),
            "codes": TensorInfo(torch.uint8, site.shape),
            **held,
        }
        return {f"{site.name}.{name}": info for name, info in entries.items()}

    def encode(self, site: Site, weight: QuantizedWeight) -> dict[str, Tensor]:
        tensors = {"weight": weight.dequantize(torch.float32), "codes": weight.codes, **_parts(weight.parameters)}
        return {f"{site.name}.{name}": tensor for name, tensor in tensors.items()}

    def decode(self, site: Site, scheme: Scheme, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        parameters = Parameters(*(tensors.get(f"{site.name}.{field.name}") for field in fields(Parameters)))  # type: ignore[arg-type]
        return QuantizedWeight.of(tensors[f"{site.name}.codes"], parameters, scheme)

    def config(self, plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> dict[str, Any]:
        """Bytes of every quantized weight; no runtime must read them, so `settle` moves them elsewhere."""
        shapes = {site.name: site.shape for site in sites}
        stored = {name: -(-scheme.storage_bits(shapes[name]) // 8) for name, scheme in plan.schemes.items()}
        return {f"{name}.weight": size_bytes for name, size_bytes in stored.items()}


def _parts(parameters: Parameters) -> dict[str, Tensor]:
    held = {field.name: getattr(parameters, field.name) for field in fields(Parameters)}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def settle(artefact: Path) -> None:
    """Move what `Dense.config` said from config.json to storage.json, and drop codes and parameters: what is left is a
    plain float model."""
    extra = ("codes", *(field.name for field in fields(Parameters)))
    for file in artefact.glob("*.safetensors"):
        kept = {
            name: tensor
            for name, tensor in load_file(file).items()
            if not name.endswith(tuple(f".{one}" for one in extra))
        }
        save_file(kept, file, metadata={"format": "pt"})
    config = json.loads((artefact / "config.json").read_text(encoding="utf-8"))
    write_storage(artefact, config.pop("quantization_config"))
    (artefact / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stored_bytes(artefact: Path) -> dict[str, int]:
    """What the decoded tensors of a dense artefact take packed, by name; empty for a packed artefact."""
    path = artefact / STORAGE_NAME
    found: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["bytes"] if path.exists() else {}
    return found


DENSE: Container = Dense()
