"""Small networks rounded to nearest, without a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.containers.onnx import edges_of
from pennyweight.evaluate.network.artefact import site_reports
from pennyweight.evaluate.network.record import NetworkRecipe, NetworkRecord
from pennyweight.models.network import QuantizedNetwork, capture
from pennyweight.plan.plan import Plan
from pennyweight.schemes import parse_scheme
from pennyweight.schemes.activation import ActivationScheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest


def mlp() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 10)
    )  # fmt: skip
    return net.eval(), torch.randn(8, 64)


def cnn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 10),
    )
    return net.eval(), torch.randn(4, 3, 16, 16)


def nearest(
    net: nn.Module, example: Any, scheme: str, *, ranges: Mapping[str, float] | None = None
) -> QuantizedNetwork:
    """`net` with all weights in `scheme`; with `ranges` edges hold [-r, r], r of "*" where nothing else is said."""
    network = capture(net, example)
    chosen = parse_scheme(scheme).with_scale_dtype(torch.float32)
    weights = {
        site.name: Nearest().solve(site.matrix(network.weight(site).detach()), chosen, Statistics()).weight
        for site in network.sites
    }
    edges = edges_of(network, sites=list(weights)) if ranges is not None else ()
    reach = {edge.value: (ranges or {}).get(edge.source, (ranges or {}).get("*", 4.0)) for edge in edges}
    plan = Plan(dict.fromkeys(weights, chosen), edges=dict.fromkeys(reach, ActivationScheme()))
    activations = {name: ActivationScheme().parameters(-r, r) for name, r in reach.items()}
    return QuantizedNetwork(network, weights, activations, plan)


def draft_of(quantized: QuantizedNetwork, runtime: str = "onnxruntime") -> NetworkRecord:
    recipe = NetworkRecipe("int4-g32", None, runtime, "normal", (), (), None, None, 0)
    inputs = {name: {"dtype": "float32", "shape": [None, 64]} for name in ("input",)}
    return NetworkRecord(recipe, {"name": "Sequential", "inputs": inputs}, site_reports(quantized))
