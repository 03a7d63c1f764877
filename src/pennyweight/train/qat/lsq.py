"""Rounding through which gradients pass, with a scale and an offset that are learnt: LSQ and LSQ+."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pennyweight.formats import NumberFormat
from pennyweight.formats.integer import Int

# In a tensor of fixed values: this one is free.
FREE = torch.iinfo(torch.int16).max
# Of a step's start: where it is held when training drives it towards 0.
LEAST = 2.0**-7
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """What a scale and a zero point are rounded to, and the numbers that they give.

    element      the number format of the values
    stored       float type of the scale
    arithmetic   float type in which a reader multiplies
    zero         the zero point where none is learnt
    """

    element: NumberFormat
    stored: torch.dtype = torch.float32
    arithmetic: torch.dtype = torch.float32
    zero: int = 0

    def scale(self, scale: Tensor) -> Tensor:
        """The nearest of the stored type, float32 (float64 stays), never 0."""
        kind = torch.promote_types(scale.dtype, torch.float32)
        least = max(_TINY, torch.finfo(self.stored).tiny)
        rounded = scale.to(kind) if self.stored == torch.float32 else scale.to(self.stored).to(kind)
        return torch.where(rounded.abs() < least, torch.where(rounded < 0, -least, least), rounded)

    def zeros(self, scale: Tensor, offset: Tensor | None) -> Tensor | None:
        """z = clamp(round(-offset / scale), smallest, largest), ties to even; None where it is 0 everywhere."""
        if offset is not None:
            return torch.div(-offset, scale).round_().clamp_(self.element.smallest, self.element.largest)
        return torch.full_like(scale, self.zero) if self.zero else None

    def values(self, x: Tensor, scale: Tensor, zeros: Tensor | None) -> Tensor:
        """clamp(round(x / scale) + z, smallest, largest) of integers, the value nearest to x / scale of others."""
        scaled = torch.div(x, scale)
        if not isinstance(self.element, Int):
            return self.element.nearest(scaled)
        rounded = scaled.round_()
        if zeros is not None:
            rounded.add_(zeros)
        return rounded.clamp_(self.element.smallest, self.element.largest)

    def decoded(self, values: Tensor, scale: Tensor, zeros: Tensor | None) -> Tensor:
        """(value - z) * scale, as a reader computes it."""
        shifted = values if zeros is None else values - zeros
        if self.arithmetic == torch.float32:
            return shifted * scale
        return (shifted.to(self.arithmetic) * scale.to(self.arithmetic)).to(values.dtype)


class _Rounding(torch.autograd.Function):
    """x̂ = s (q - z),  q = clamp(round(x / s) + z, n, p),  z = clamp(round(-β / s), n, p)

    with v = x / s + z and straight-through rounding of q, z and of s to its stored type:

        dx̂/dx = 1           inside (n <= v <= p),   0 outside
        dx̂/ds = q - v       inside,                 q outside with β learnt (x̂ = s q + β), else q - z
        dx̂/dβ = 0           inside,                 1 outside

    Esser et al., "Learned step size quantization" (2020), equations 1-3; Bhalgat et al., "LSQ+" (2020), equations 4-6,
    with β kept at a whole number of steps. Values that are `fixed` count as outside.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, fixed: Tensor | None, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, scale, offset, fixed)
        ctx.grid = grid
        s = grid.scale(scale)
        z = grid.zeros(s, offset)
        return grid.decoded(kept(grid.values(x, s, z), fixed), s, z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, scale, offset, fixed = ctx.saved_tensors
        grid: Grid = ctx.grid
        s = grid.scale(scale)
        z = grid.zeros(s, offset)
        v = torch.div(x, s) if z is None else torch.div(x, s).add_(z)
        inside = (v >= grid.element.smallest) & (v <= grid.element.largest)
        if fixed is not None:
            inside &= fixed == FREE
        wants_x, wants_scale, wants_offset = ctx.needs_input_grad[:3]
        to_scale = to_offset = None
        if wants_scale:
            q = kept(grid.values(x, s, z), fixed)
            outside = q if z is None or offset is not None else q - z
            to_scale = (gradient * torch.where(inside, q - v, outside)).sum_to_size(scale.shape)
        if wants_offset:
            to_offset = torch.where(inside, 0, gradient).sum_to_size(offset.shape)
        return torch.where(inside, gradient, 0) if wants_x else None, to_scale, to_offset, None, None


def kept(values: Tensor, fixed: Tensor | None) -> Tensor:
    """`fixed` in place of `values` where it is not FREE."""
    return values if fixed is None else torch.where(fixed == FREE, values, fixed.to(values.dtype))


class _Sized(torch.autograd.Function):
    """See `sized`."""

    @staticmethod
    def forward(ctx: Any, relative: Tensor, unit: Tensor, least: float, factor: float) -> Tensor:
        ctx.save_for_backward(unit)
        ctx.factor = factor
        return relative.clamp_min(least) * unit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        [unit] = ctx.saved_tensors
        return gradient * (ctx.factor / unit), None, None, None


class _Through(torch.autograd.Function):
    """See `passed_through`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, made: Tensor) -> Tensor:
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def rounded(x: Tensor, scale: Tensor, offset: Tensor | None, fixed: Tensor | None, grid: Grid) -> Tensor:
    """`x` on the grid of `scale` and `offset`, which broadcast over it; see `_Rounding` for the gradients.

    fixed  int16 as `x`: values that stay whatever x is, FREE where they may change
    """
    made: Tensor = _Rounding.apply(x, scale, offset, fixed, grid)  # type: ignore[no-untyped-call]
    return made


def sized(relative: Tensor, unit: Tensor, *, least: float, factor: float) -> Tensor:
    """max(relative, least) * unit; its gradient, which passes at every size, goes to `relative` times factor / unit.

    A step of SGD at rate r then moves the result by r * factor * slope whatever the unit is, as LSQ has it, and one of
    Adam by r * unit: its own size.
    """
    made: Tensor = _Sized.apply(relative, unit, least, factor)  # type: ignore[no-untyped-call]
    return made


def passed_through(x: Tensor, made: Tensor) -> Tensor:
    """`made`, whose gradient goes to `x` as it is: nothing is clipped."""
    result: Tensor = _Through.apply(x, made)  # type: ignore[no-untyped-call]
    return result


def gradient_factor(count: int, element: NumberFormat) -> float:
    """LSQ's g = 1 / sqrt(N p) for a step that N = `count` numbers share, p the largest value: steps and weights then
    change by the same share of their size (Esser et al., section 2.2)."""
    return float((max(count, 1) * max(element.largest, 1.0)) ** -0.5)


def weight_gradient_factor(count: int, element: NumberFormat) -> float:
    """1 / (sqrt(N) p) for weights. A number that is cut off pulls p times as hard at the step as at itself: with LSQ's
    factor the few weights of a channel move a step of 8 bits so far that training diverges. At p = 1 both are one."""
    return gradient_factor(count, element) * float(max(element.largest, 1.0) ** -0.5)
