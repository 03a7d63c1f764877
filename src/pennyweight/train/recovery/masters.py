"""What is trained: float32 masters of numbers that are stored in fewer bits, and the slopes of a site's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pennyweight.models.base import Site
from pennyweight.schemes import QuantizedWeight, ScaleSpec
from pennyweight.schemes.parameters import Parameters, gathered
from pennyweight.schemes.quantized import grouped


@dataclass(frozen=True)
class Master:
    """value = stored(start + unit * step): `step` float32 is trained, from zeros; the value is rounded to the stored
    type, which the slope does not see (straight-through). At step 0 it is `start`, bit for bit.
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


def coarseness(bits: float) -> float:
    """How far a step goes at `bits` against 4 bits: the error of rounding halves with each bit, and so must what is
    moved to make up for it."""
    return float(2.0 ** (4 - bits))


def vector_master(stored: Tensor, *, bits: float = 4) -> Master:
    """Of a norm or a bias of a model whose weights have `bits` on average: one step is its root mean square, or 1
    where that is zero, times `coarseness`."""
    size = stored.float().square().mean().sqrt()
    return Master.of(stored, unit=torch.where(size > 0, size, 1.0) * coarseness(bits))


@dataclass(frozen=True)
class TrainedSite:
    """A site with frozen codes, of whose parameters those are trained that are stored as floats.

    masters   by field of Parameters: "scales", "zeros", "offsets", "parents", "offset_parents"
    """

    site: Site
    start: QuantizedWeight
    masters: Mapping[str, Master]

    @staticmethod
    def of(site: Site, weight: QuantizedWeight) -> TrainedSite:
        # Of a zero point one step is a code, of an offset a scale, of anything else its own size, times `coarseness`:
        # a scale of zero stays zero.
        parts = _floats(weight.parameters)
        scales = weight.parameters.decoded(weight.scheme).scales.abs()
        sizes = {"zeros": torch.ones_like(scales), "offsets": scales}
        each = coarseness(weight.scheme.element.bits)
        masters = {
            name: Master.of(part, unit=each * sizes.get(name, part.float().abs())) for name, part in parts.items()
        }
        return TrainedSite(site, weight, masters)

    @property
    def weight(self) -> QuantizedWeight:
        """With everything rounded to the stored types."""
        values = {name: master.value for name, master in self.masters.items()}
        return QuantizedWeight.of(self.start.codes, replace(self.start.parameters, **values), self.start.scheme)

    def slopes(self, dw: Tensor) -> dict[str, Tensor]:
        """By the chain rule from w = scale * (value - zero) or scale * value - offset, scale = parent * own,

            d scale  =  sum_i dw_i * (value_i - zero)        d zero   = -scale * sum_i dw_i
            d parent =  sum_j own_j * d scale_j              d offset = -sum_i dw_i

        with sums over the weights i that share a scale and the scales j that share a parent. `dw` float32 [out, in] is
        the gradient with respect to the decoded weight.
        """
        scheme, stored = self.start.scheme, self.weight.parameters
        given = stored.decoded(scheme)
        scales = (grouped(dw, scheme) * scheme.element.decode(grouped(self.start.codes, scheme))).sum(-1)
        total = grouped(dw, scheme).sum(-1)
        if given.zeros is not None:
            scales = scales - given.zeros * total
        gradients = {"scales": scales, "zeros": -given.scales * total, "offsets": -total}
        gradients["parents"] = _of_parents(scales, stored.scales, scheme.scale)
        if stored.offsets is not None and scheme.offset is not None:
            gradients["offset_parents"] = _of_parents(-total, stored.offsets, scheme.offset)
        return {name: master.slope(gradients[name]) for name, master in self.masters.items()}


def _floats(parameters: Parameters) -> dict[str, Tensor]:
    """Those of `parameters` that are stored as floats."""
    parts = {field.name: getattr(parameters, field.name) for field in fields(parameters)}
    return {name: part for name, part in parts.items() if part is not None and part.is_floating_point()}


def _of_parents(slopes: Tensor, stored: Tensor, spec: ScaleSpec) -> Tensor:
    """sum_j own_j * slope_j over the scales or offsets of each parent."""
    return gathered(slopes if spec.element is None else slopes * spec.element.decode(stored), spec)
