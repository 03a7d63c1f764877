"""AWQ: channels that matter are made larger before they are rounded.

Lin et al., "AWQ: Activation-aware Weight Quantization" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pennyweight.core.parallel import parallel_map
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.schemes import fit_scales
from pennyweight.schemes.quantized import grouped
from pennyweight.solvers.nearest import round_to_nearest
from pennyweight.transforms.base import Rescaling, Weighed
from pennyweight.transforms.rescale import per_column

# Rows of all readers of a fold that candidates are tried on: the best scale of hundreds of rows is that of thousands.
_ROWS = 1024
# Channels smaller than this share of the mean count as of this size.
_SMALLEST = 1e-4


@dataclass(frozen=True)
class Awq:
    """min over s of the sum over the fold's readers of tr(E H Eᵀ), E = q(W diag(s)) diag(1/s) - W

    with q rounding to nearest on fitted scales, over s = m_x^a and s = m_x^a / m_w^(1-a), a = 0, 1/steps, ... 1. m_x is
    the mean of |x| of each channel (its root mean square where only a Hessian is known), m_w the mean over rows of |w|
    relative to the largest |w| of its group. s is divided by sqrt(max(s) min(s)). The Hessian stands for running the
    block. Rows are sampled, evenly.
    """

    steps: int = 20
    name: str = "awq"

    def choose(self, readers: list[Weighed], size: int) -> Tensor | None:
        known = [reader for reader in readers if reader.stats.hessian is not None and reader.w.numel()]
        if not known:
            return None
        every = max(1, -(-sum(reader.w.shape[0] for reader in known) // _ROWS))
        sampled = [(reader, reader.w[::every].float().contiguous()) for reader in known]
        candidates = [None, *self._candidates(sampled, size)]
        errors = parallel_map(lambda s: _error(sampled, s), candidates)
        return candidates[min(range(len(errors)), key=errors.__getitem__)]

    def _candidates(self, sampled: Sequence[tuple[Weighed, Tensor]], size: int) -> list[Tensor]:
        m_x = _mean_per_channel([(reader, _input_size(reader)) for reader, _ in sampled], size)
        m_w = _mean_per_channel([(reader, _relative_size(reader, w)) for reader, w in sampled], size)
        powers = [step / self.steps for step in range(self.steps + 1)]
        plain = [m_x**a for a in powers[1:]]
        both = [m_x**a / m_w ** (1 - a) for a in powers[:-1]]
        return [s / (s.max() * s.min()).sqrt() for s in (*plain, *both)]


def _error(sampled: Sequence[tuple[Weighed, Tensor]], s: Tensor | None) -> float:
    """Sum over the readers of tr(E H Eᵀ) on the sampled rows."""
    total = 0.0
    for reader, w in sampled:
        hessian = reader.stats.hessian
        assert hessian is not None
        columns = torch.ones_like(w[0]) if s is None else per_column(s, reader.source)
        scaled = w * columns
        parameters = fit_scales(scaled, reader.scheme, importance=hessian.diagonal() / columns.square())
        error = round_to_nearest(scaled, reader.scheme, parameters).dequantize() / columns - w
        total += float((matmul_nt(error, hessian) * error).double().sum())
    return total


def _input_size(reader: Weighed) -> Tensor:
    """mean |x| of each column, relative to its mean over the columns."""
    assert reader.stats.hessian is not None
    size = reader.stats.hessian.diagonal().sqrt() if reader.magnitude is None else reader.magnitude.mean
    return size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)


def _relative_size(reader: Weighed, w: Tensor) -> Tensor:
    """mean over rows of |w| / (largest |w| of the group) of each column."""
    groups = grouped(w, reader.scheme).abs()
    largest = groups.amax(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    return (groups / largest).reshape(w.shape).mean(0)


def _mean_per_channel(of: Sequence[tuple[Weighed, Tensor]], size: int) -> Tensor:
    """Mean over the columns of all readers that are the same channel, [size]; never zero."""
    total = torch.zeros(size + 1)
    count = torch.zeros(size + 1)
    for reader, columns in of:
        # Columns of no channel are counted in a place of their own, the last one.
        place = reader.source % (size + 1)
        total.index_add_(0, place, columns.cpu())
        count.index_add_(0, place, torch.ones_like(columns.cpu()))
    mean = (total / count.clamp_min(1))[:size]
    return mean.clamp_min(_SMALLEST * float(mean.mean()) or 1.0)


PROVIDES: tuple[Rescaling, ...] = (Awq(),)
