"""From gradients to directions: in which proportion parameters move in one step, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Rule = Literal["sign", "moments"]

_MEAN_DECAY, _SQUARE_DECAY = 0.9, 0.95


def falling_rate(step: int, steps: int) -> float:
    """2 / steps (1 - step / steps): over all steps, from 0, it adds up to 1 (and 1 / steps)."""
    return 2 / steps * (1 - step / steps)


class Direction(Protocol):
    def of(self, gradient: Tensor, step: int) -> Tensor:
        """The direction [rows, columns] to go against in step `step`, from 0, for this `gradient`."""


def direction(rule: Rule, shape: tuple[int, int], device: torch.device) -> Direction:
    return Sign() if rule == "sign" else Moments.zero(shape, device)


@dataclass(frozen=True)
class Sign:
    """u = sign(g): SignSGD (Bernstein et al., 2018)."""

    def of(self, gradient: Tensor, step: int) -> Tensor:
        return gradient.sign()


@dataclass(frozen=True)
class Moments:
    """u = m / sqrt(v), v = r cᵀ / mean(r): Adam with the second moment in factors (Shazeer and Stern, "Adafactor",
    2018), so that one number is kept for each parameter, not two.

    m   running mean of g (decay 0.9)
    r   running mean of the rows' means of g² (decay 0.95), c of the columns'

    each divided by 1 - decayᵗ, which undoes their start from zero.
    """

    mean: Tensor
    rows: Tensor
    columns: Tensor

    @staticmethod
    def zero(shape: tuple[int, int], device: torch.device) -> Moments:
        rows, columns = shape
        return Moments(*(torch.zeros(size, device=device) for size in ((rows, columns), (rows, 1), (1, columns))))

    def of(self, gradient: Tensor, step: int) -> Tensor:
        square = gradient.square()
        self.mean.lerp_(gradient, 1 - _MEAN_DECAY)
        self.rows.lerp_(square.mean(1, keepdim=True), 1 - _SQUARE_DECAY)
        self.columns.lerp_(square.mean(0, keepdim=True), 1 - _SQUARE_DECAY)
        mean_share, square_share = (1 - decay ** (step + 1) for decay in (_MEAN_DECAY, _SQUARE_DECAY))
        # Roots first: products of squares of small gradients would vanish.
        rows, columns = self.rows.sqrt(), self.columns.sqrt()
        over = self.rows.mean().sqrt()
        inverse_rows, inverse_columns = (torch.where(x > 0, x.reciprocal(), 0.0) for x in (rows, columns))
        correction: float = square_share**0.5 / mean_share
        return (self.mean * (inverse_rows * over * correction)).mul_(inverse_columns)
