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
from pennyweight.pipeline.chain import Chain
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.records import SiteRecord
from pennyweight.schemes import QuantizedWeight, Scheme
from pennyweight.schemes.quantized import grouped
from pennyweight.solvers.base import Solver, Statistics
from pennyweight.solvers.nearest import Nearest, round_to_nearest

_SAMPLED_ROWS = 32
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


def solve_site(site: Site, w: Tensor, scheme: Scheme, chain: Chain, found: SiteStatistics) -> SolvedSite:
    """The codes of `site` and its record; `w` float [out, in] (or rows of it), finite. Errors name the site."""
    is_blind = "hessian" in chain.solver.needs and found.stats.hessian is None
    solver: Solver = Nearest(chain.fit) if is_blind else chain.solver
    try:
        solution = solver.solve(w if isinstance(solver, Nearest) else w.float(), scheme, found.stats)
    except PennyweightError as failure:
        raise type(failure)(f"{site.name}: {failure}") from failure
    has_feedback = not isinstance(solver, Nearest)
    error, nearest = _errors(w, solution.weight, found.stats, every=_every(site), has_nearest=has_feedback)
    record = SiteRecord(site.name, scheme.name, error, nearest, found.rows, found.notes + solution.notes)
    return SolvedSite(_with_exact_zeros(solution.weight, w), record)


def _with_exact_zeros(weight: QuantizedWeight, w: Tensor) -> QuantizedWeight:
    """`weight` with a scale of 0 for the groups of zeros in `w` that no solver made anything else of, where its number
    format has no 0. Solvers divide by scales, and therefore know none of 0."""
    scheme = weight.scheme
    element, own = scheme.element, scheme.scale.element
    nothing, zero = torch.zeros(1, device=w.device), torch.zeros(1, dtype=scheme.scale.torch_dtype, device=w.device)
    least = element.encode(nothing)
    has_zero = scheme.zero is not None or scheme.offset is not None or bool(element.decode(least) == 0)
    if own is not None:
        zero = own.encode(nothing)
        has_zero |= bool(own.decode(zero) != 0)
    if has_zero or w.numel() == 0:
        return weight
    is_empty = ((grouped(w, scheme) == 0) & (grouped(weight.codes, scheme) == least)).all(-1)
    return replace(weight, scales=torch.where(is_empty, zero, weight.scales))


def again_measured(
    site: Site, w: Tensor, weight: QuantizedWeight, found: SiteStatistics, record: SiteRecord
) -> SiteRecord:
    """`record` with the error of the codes that came out of refining the block; that of nearest stays."""
    error, _ = _errors(w, weight, found.stats, every=_every(site), has_nearest=False)
    return replace(record, error=error)


def _every(site: Site) -> int:
    return max(1, -(-site.shape[0] // _SAMPLED_ROWS))


def joined(parts: Sequence[SolvedSite]) -> SolvedSite:
    """One site from the solutions of its consecutive rows; the errors are their means weighted by rows."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    weights = [part.weight for part in parts]
    rows = [weight.shape[0] for weight in weights]
    error, nearest = (
        math.fsum(n * getattr(part.record, name) for n, part in zip(rows, parts, strict=True)) / sum(rows)
        for name in ("error", "error_nearest")
    )
    notes = tuple(dict.fromkeys(note for part in parts for note in part.record.notes))
    record = replace(first.record, error=error, error_nearest=nearest, notes=notes)
    return SolvedSite(QuantizedWeight.join(weights), record)


def _errors(
    w: Tensor, weight: QuantizedWeight, stats: Statistics, *, every: int, has_nearest: bool
) -> tuple[float, float]:
    """Relative errors of the result and of rounding to nearest with the same scales, on every `every`-th row. Without
    `has_nearest` both are that of the result."""
    if w.numel() == 0:
        return 0.0, 0.0
    rows = torch.arange(0, w.shape[0], every, device=w.device)
    sample = w[rows].float()
    result = weight.rows(rows)
    compared = [sample, sample - result.dequantize()]
    if has_nearest:
        compared.append(sample - round_to_nearest(sample, result.scheme, result.parameters).dequantize())
    total, *errors = _energies(torch.stack(compared), stats)
    return (errors[0] / total, errors[-1] / total) if total else (0.0, 0.0)


def _energies(e: Tensor, stats: Statistics) -> list[float]:
    """tr(E H Eᵀ) of each E in `e` [n, rows, in], of H what is known, else |E|²; summed in float64 in a fixed order."""
    hessian, weights = stats.hessian, 1.0 if stats.diagonal is None else stats.diagonal.double()
    if hessian is None:
        return parallel_map(lambda x: float((x.double().square() * weights).sum()), list(e))

    def part(columns: slice) -> Tensor:
        products = matmul_nt(e.flatten(0, 1), hessian[columns]).view(e.shape[0], e.shape[1], -1)
        return products.mul_(e[:, :, columns]).double().sum((1, 2))

    energies: list[float] = sum(
        parallel_map(part, chunks(hessian.shape[0], _PRODUCT)), e.new_zeros((), dtype=torch.float64)
    ).tolist()
    return energies
