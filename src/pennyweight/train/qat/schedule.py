"""How rates and factors change over the steps of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pennyweight.train.qat.options import FitOptions


@dataclass(frozen=True)
class Schedule:
    """For each of `total` steps, counted from 0."""

    options: FitOptions
    total: int

    def rate(self, step: int) -> float:
        """As a share of the highest: up in a line over the warm-up, then down to 0 as a cosine."""
        rising = round(self.options.warm_up * self.total)
        if step < rising:
            return (step + 1) / rising
        return falling((step - rising) / max(1, self.total - rising))

    def is_norm_frozen(self, step: int) -> bool:
        return step >= self.total - round(self.options.frozen_norms * self.total)

    def dampening(self, step: int) -> float:
        return self.options.dampening * (1 - falling(step / max(1, self.total)))

    def freeze_above(self, step: int) -> float | None:
        """Below half of the steps nothing has turned often enough to be judged by an average over 100 steps."""
        if self.options.freezing is None:
            return None
        first, last = self.options.freezing
        return last + (first - last) * falling(step / max(1, self.total))


def falling(share: float) -> float:
    """From 1 to 0 as a cosine, for a share from 0 to 1."""
    return (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2
