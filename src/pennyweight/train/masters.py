"""What is trained: float32 masters of numbers that are stored in fewer bits, and the slopes of a site's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.models.base import Site
from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.quantized import grouped


@dataclass(frozen=True)
class Master:
    """value = stored(start + unit * step): `step` float32 is trained, from zeros, so that a step of 0.01 means one
    hundredth of a scale whatever its size; the value is rounded to the stored type, which the slope does not see
    (straight-through). At step 0 it is `start`, bit for bit.
    """

    start: Tensor
    unit: Tensor
    step: Tensor

    @staticmethod
    def of(start: Tensor, *, unit: Tensor) -> Master:
        return Master(start, unit, torch.zeros_like(start, dtype=torch.float32))

    @property
    def value(self) -> Tensor:
        limit = torch.finfo(self.start.dtype).max
        return (self.start.float() + self.unit * self.step).clamp_(-limit, limit).to(self.start.dtype)

    def slope(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to `step` from that with respect to the value."""
        return gradient.float() * self.unit


def vector_master(stored: Tensor) -> Master:
    """Of a norm or a bias: one step is its root mean square, or 1 where that is zero."""
    size = stored.float().square().mean().sqrt()
    return Master.of(stored, unit=torch.where(size > 0, size, 1.0))


@dataclass(frozen=True)
class TrainedSite:
    """A site with frozen codes: w = scale * (value(code) - zero), of which the scales are trained."""

    site: Site
    start: QuantizedWeight
    scales: Master

    @staticmethod
    def of(site: Site, weight: QuantizedWeight) -> TrainedSite:
        # A scale of zero stays zero.
        return TrainedSite(site, weight, Master.of(weight.scales, unit=weight.scales.float().abs()))

    @property
    def masters(self) -> dict[str, Master]:
        return {"scales": self.scales}

    @property
    def weight(self) -> QuantizedWeight:
        """With everything rounded to the stored types."""
        return replace(self.start, scales=self.scales.value)

    def slopes(self, dw: Tensor) -> dict[str, Tensor]:
        """By the chain rule, sums over the weights that share a scale:

            d scale = sum_i dw_i * (value_i - zero)

        `dw` float32 [out, in], the gradient with respect to the decoded weight.
        """
        scheme = self.start.scheme
        values = scheme.element.decode(grouped(self.start.codes, scheme))
        if self.start.zeros is not None:
            values = values - self.start.zeros[..., None]
        return {"scales": self.scales.slope((grouped(dw, scheme) * values).sum(-1))}
