"""Solving the sites of a block, and measuring what each one lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.core.errors import PennyweightError, WeightError
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.models.base import Site
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.records import SiteRecord
from pennyweight.schemes import PerTensor, QuantizedWeight, Scheme
from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Solver, Statistics
from pennyweight.solvers.nearest import Nearest, round_to_nearest

_SAMPLED_ROWS = 64
# Rows and columns per product: constants, so that sums are cut alike whatever the number of threads.
_PRODUCT = 512


@dataclass(frozen=True)
class SolvedSite:
    weight: QuantizedWeight
    record: SiteRecord


def check_finite(w: Tensor, name: str) -> None:
    """Raises WeightError that names the tensor where it holds NaN or infinity."""
    # The sum of finite numbers may overflow but a non-finite one never gives a finite sum: the cheap test first.
    if not w.sum().isfinite() and not w.isfinite().all():
        bad = int((~w.isfinite()).sum())
        raise WeightError(
            f"{name}: {bad} of {w.numel()} weights are NaN or infinite; a model with such weights is damaged: "
            "download or train it again"
        )


def solve_site(site: Site, w: Tensor, scheme: Scheme, solver: Solver, fit: Fit, found: SiteStatistics) -> SolvedSite:
    """The codes of `site` and its record; `w` float [out, in] (or rows of it), finite. Errors name the site."""
    chosen: Solver = Nearest(fit) if any(getattr(found.stats, need) is None for need in solver.needs) else solver
    try:
        solution = chosen.solve(w if isinstance(chosen, Nearest) else w.float(), scheme, found.stats)
    except PennyweightError as failure:
        raise type(failure)(f"{site.name}: {failure}") from failure
    every = max(1, -(-site.shape[0] // _SAMPLED_ROWS))
    error, nearest = _errors(w, solution.weight, found.stats, every=every)
    record = SiteRecord(site.name, scheme.name, error, nearest, found.rows, found.notes + solution.notes)
    return SolvedSite(solution.weight, record)


def joined(parts: Sequence[SolvedSite]) -> SolvedSite:
    """One site from the solutions of its consecutive rows; the errors are their means weighted by rows."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    weights = [part.weight for part in parts]
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    whole = QuantizedWeight(
        torch.cat([weight.codes for weight in weights]),
        torch.cat([weight.scales for weight in weights]),
        torch.cat(zeros) if zeros else None,
        first.weight.scheme,
    )
    rows = [weight.shape[0] for weight in weights]
    error, nearest = (
        math.fsum(n * getattr(part.record, name) for n, part in zip(rows, parts, strict=True)) / sum(rows)
        for name in ("error", "error_nearest")
    )
    notes = tuple(dict.fromkeys(note for part in parts for note in part.record.notes))
    record = replace(first.record, error=error, error_nearest=nearest, notes=notes)
    return SolvedSite(whole, record)


def _errors(w: Tensor, weight: QuantizedWeight, stats: Statistics, *, every: int) -> tuple[float, float]:
    """Relative errors of the result and of rounding to nearest with the same scales, on every `every`-th row."""
    if w.numel() == 0:
        return 0.0, 0.0
    rows = torch.arange(0, w.shape[0], every, device=w.device)
    sample = w[rows].float()
    result = _take(weight, rows)
    nearest = round_to_nearest(sample, result.scheme, result.scales, result.zeros)
    total = _energy(sample, stats.hessian)
    if total == 0:
        return 0.0, 0.0
    error = _energy(sample - result.dequantize(), stats.hessian) / total
    if torch.equal(nearest.codes, result.codes):
        return error, error
    return error, _energy(sample - nearest.dequantize(), stats.hessian) / total


def _take(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    own = slice(None) if isinstance(weight.scheme.granularity, PerTensor) else rows
    zeros = None if weight.zeros is None else weight.zeros[own]
    return QuantizedWeight(weight.codes[rows], weight.scales[own], zeros, weight.scheme)


def _energy(e: Tensor, hessian: Tensor | None) -> float:
    """tr(E H Eᵀ), or |E|² without a Hessian; summed in float64 in a fixed order."""
    if hessian is None:
        [plain] = parallel_map(lambda x: float(x.double().square().sum()), [e])
        return plain
    whole = e.contiguous()

    def part(columns: slice) -> float:
        return float((matmul_nt(whole, hessian[columns]) * whole[:, columns]).double().sum())

    return sum(parallel_map(part, chunks(hessian.shape[0], _PRODUCT)))
