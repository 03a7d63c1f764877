"""Seeded toy blocks: two linear maps with a nonlinearity between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pennyweight.schemes import parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.learned.base import BlockProblem
from pennyweight.solvers.nearest import Nearest

INPUTS, HIDDEN, OUTPUTS = 32, 64, 16


def toy(name: str = "int3-g16-f16", *, seed: int = 0, batches: int = 5, tokens: int = 40) -> BlockProblem:
    """y = B gelu(A x), A [64, 32] and B [16, 64] rounded to nearest at the start."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "a": torch.randn(HIDDEN, INPUTS, generator=generator) / INPUTS**0.5,
        "b": torch.randn(OUTPUTS, HIDDEN, generator=generator) / HIDDEN**0.5,
    }
    mixing = torch.randn(INPUTS, INPUTS, generator=generator) / torch.arange(1, INPUTS + 1)[:, None].sqrt()
    x = [torch.randn(1, tokens, INPUTS, generator=generator) @ mixing for _ in range(batches)]

    def forward(given: Mapping[str, Tensor], batch: int) -> Tensor:
        own = {**weights, **given}
        return torch.nn.functional.gelu(x[batch].to(own["a"].dtype) @ own["a"].T) @ own["b"].T

    scheme = parse_scheme(name).with_scale_dtype(torch.float16)
    start = {site: Nearest().solve(w, scheme, Statistics()).weight for site, w in weights.items()}
    return BlockProblem(weights, start, forward, [forward(weights, batch) for batch in range(batches)])


def without(problem: BlockProblem, site: str) -> BlockProblem:
    """The same with `site` left in float."""
    return replace(problem, start={name: weight for name, weight in problem.start.items() if name != site})


def error_in_float64(problem: BlockProblem, weights: Mapping[str, Tensor]) -> float:
    """mean over all batches of (output - target)²."""
    everything = {**problem.weights, **weights}
    errors = [
        (problem.forward({name: w.double() for name, w in everything.items()}, batch) - target).double().square()
        for batch, target in enumerate(problem.targets)
    ]
    return float(torch.cat(errors, 1).mean())
