"""Rescaling the folds of an opened block, and what its statistics are afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pennyweight.schemes import Scheme
from pennyweight.solvers.base import Statistics
from pennyweight.stats.magnitude import Magnitude
from pennyweight.transforms.base import Fold, Part, Reader, Rescaling, Weighed
from pennyweight.transforms.structure import scaled


@dataclass(frozen=True)
class Observed:
    """A matrix of the block that will be quantized.

    parameter  of the block that holds it; stacked experts share one
    w          [out, in], a view of that parameter's memory
    stats, magnitude  of its input
    """

    parameter: str
    w: Tensor
    scheme: Scheme
    stats: Statistics
    magnitude: Magnitude | None = None


@dataclass(frozen=True)
class Rescaled:
    """A fold with the scales s [size] that were applied, and the kept parameters that are no longer what they were."""

    fold: Fold
    s: Tensor
    changed: tuple[str, ...]


def rescale_block_(
    block: nn.Module,
    folds: Sequence[Fold],
    rescaling: Rescaling,
    *,
    matrices: Mapping[str, Observed],
    stored: Mapping[str, torch.dtype],
) -> tuple[list[Rescaled], dict[str, Observed]]:
    """Rewrite the block's folds with the scales that `rescaling` chooses for the `matrices`, by site name.

    `stored` has the type of every parameter that is kept in float, by its name in the block: it will hold values of
    that type, and must be written again where it is `changed`. Returns the folds that were rescaled, and the matrices
    with the statistics of their new inputs.
    """
    done: list[Rescaled] = []
    now = dict(matrices)
    for fold in folds:
        by_parameter = {reader.parameter: reader for reader in fold.readers}
        read = {name: m for name, m in now.items() if m.parameter in by_parameter and m.parameter not in stored}
        if not read:
            continue
        weighed = [
            Weighed(m.w, by_parameter[m.parameter].source, m.scheme, m.stats, m.magnitude) for m in read.values()
        ]
        s = rescaling.choose(weighed, fold.size)
        if s is None:
            continue
        rescaled = rescale_(block, fold, s, stored=stored)
        done.append(rescaled)
        now |= _observed_after(read, by_parameter, rescaled.s)
    return done, now


def rescale_(block: nn.Module, fold: Fold, s: Tensor, *, stored: Mapping[str, torch.dtype]) -> Rescaled:
    """producer / s, readers * s, in the block's memory; parameters in `stored` end as values of their stored type.

    A norm's weight w alone becomes w' = w / s rounded to its type, and s the quotient w / w' that it then is. Where
    anything else is kept (a bias, a router, a matrix in float) s is rounded to powers of two, which change no digit.
    """
    names = [part.parameter for part in fold.producer] + [reader.parameter for reader in fold.readers]
    kept = tuple(name for name in names if name in stored)
    first = fold.producer[0]
    s = s.to(block.get_parameter(first.parameter))
    if kept and kept != (first.parameter,):
        s = torch.exp2(torch.log2(s).round())
    if fold.is_norm and first.parameter in stored:
        s = _as_stored(block.get_parameter(first.parameter).detach()[first.rows], s, first, stored[first.parameter])
    for part in fold.producer:
        _scale_part_(block, part, s, stored.get(part.parameter))
    for reader in fold.readers:
        _scale_reader_(block, reader, s, stored.get(reader.parameter))
    return Rescaled(fold, s, kept)


def per_column(s: Tensor, source: Tensor) -> Tensor:
    """The scale of each input [in] of a reader."""
    return torch.cat([s, s.new_ones(1)])[source.to(s.device)]


def divided(stats: Statistics, columns: Tensor) -> Statistics:
    """The statistics of x / columns."""
    over = torch.outer(columns, columns)
    hessian = None if stats.hessian is None else stats.hessian / over
    cross = None if stats.cross is None else stats.cross / over
    return Statistics(hessian, cross)


def _as_stored(p: Tensor, s: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    """The scales that dividing `p` by `s` comes to when the quotient is rounded to `dtype`."""
    plus = 1.0 if part.style == "one-plus" else 0.0
    after = scaled(p, part.style, 1 / s).to(dtype).to(p) + plus
    quotient = (p + plus) / after
    # A channel that is zero makes nothing of any scale; one that would vanish in the stored type keeps its own.
    fine = quotient.isfinite() & (quotient > 0)
    return torch.where(fine, quotient, torch.where(p + plus == 0, s, 1.0))


def _scale_part_(block: nn.Module, part: Part, s: Tensor, dtype: torch.dtype | None) -> None:
    p = block.get_parameter(part.parameter).detach()
    rows = part.rows.to(p.device)
    channels = p.movedim(part.axis, -1)
    made = scaled(channels[..., rows], part.style, 1 / s)
    channels[..., rows] = made if dtype is None else made.to(dtype).to(p)


def _scale_reader_(block: nn.Module, reader: Reader, s: Tensor, dtype: torch.dtype | None) -> None:
    p = block.get_parameter(reader.parameter).detach()
    columns = per_column(s, reader.source)
    p.mul_(columns if reader.axis == -1 else columns[:, None])
    if dtype is not None:
        p.copy_(p.to(dtype))


def _observed_after(read: Mapping[str, Observed], readers: Mapping[str, Reader], s: Tensor) -> dict[str, Observed]:
    """Sites that shared their statistics still do."""
    made: dict[tuple[int, bytes], Statistics] = {}
    after: dict[str, Observed] = {}
    for name, matrix in read.items():
        source = readers[matrix.parameter].source
        columns = per_column(s, source)
        key = (id(matrix.stats), source.numpy().tobytes())
        if key not in made:
            made[key] = divided(matrix.stats, columns)
        magnitude = None if matrix.magnitude is None else matrix.magnitude.divided(columns)
        after[name] = replace(matrix, stats=made[key], magnitude=magnitude)
    return after
