"""Trained multipliers of the floats that scales and offsets go back to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.parameters import gathered
from pennyweight.schemes.quantized import grouped
from pennyweight.schemes.storage import ScaleSpec
from pennyweight.solvers.learned.directions import Direction, Rule, direction

# A range is at most halved or doubled.
_LEAST, _MOST = 0.5, 2.0


@dataclass(frozen=True)
class Multipliers:
    """m of scale = value(code) * (m * parent), or of scale = m * scale where scales are floats; of offsets alike.

    The product is rounded to the stored type before it is used. m starts at 1.

    field       which of a weight's Parameters is multiplied
    spec        the scheme's scale or offset
    of_offsets  it belongs to the offsets, not to the scales
    start       float32, the field at the start
    factors     m, of the same shape
    """

    field: str
    spec: ScaleSpec
    of_offsets: bool
    start: Tensor
    factors: Tensor
    direction: Direction

    @staticmethod
    def of(weight: QuantizedWeight, rule: Rule) -> list[Multipliers]:
        """Those of the scales and of the offsets of `weight`, as far as they go back to floats."""
        scheme = weight.scheme
        fields = (("scales", "parents", scheme.scale), ("offsets", "offset_parents", scheme.offset))
        found = []
        for own, parents, spec in fields:
            field = own if spec is not None and spec.element is None else parents
            stored: Tensor | None = getattr(weight, field)
            if spec is not None and stored is not None:
                start = stored.float()
                shape = (start.shape[0], start.shape[1])
                found.append(
                    Multipliers(
                        field,
                        spec,
                        own == "offsets",
                        start,
                        torch.ones_like(start),
                        direction(rule, shape, start.device),
                    )
                )
        return found

    def applied(self, weight: QuantizedWeight) -> QuantizedWeight:
        stored: Tensor = getattr(weight, self.field)
        product = (self.start * self.factors).to(stored.dtype)
        element = weight.scheme.element
        # |value - zero| is at most twice the format's reach: beyond this limit the weight could overflow.
        limit = torch.finfo(stored.dtype).max / (4 * max(-element.smallest, element.largest))
        kept = torch.where(product.abs() <= limit, product, self.start.to(stored.dtype))
        parameters = replace(weight.parameters, **{self.field: kept})
        return QuantizedWeight.of(weight.codes, parameters, weight.scheme)

    def step_(self, gradient: Tensor, start: QuantizedWeight, decoded: Tensor, *, step: int, rate: float) -> None:
        """One step for the gradient [out, in] with respect to the `decoded` weight.

        dL/dm = sum over the weights that share it of dL/dw * dw/dm, with m taken as 1 in

            dw/dm = scale * (value - zero) for scales,  -offset for offsets
        """
        view = grouped(decoded, start.scheme)
        offsets = start.parameters.decoded(start.scheme).offsets
        if self.of_offsets:
            assert offsets is not None
            slope = -offsets[..., None]
        else:
            slope = view if offsets is None else view + offsets[..., None]
        parts = (grouped(gradient, start.scheme) * slope).sum(-1)
        self.factors.sub_(self.direction.of(gathered(parts, self.spec), step), alpha=rate)
        self.factors.clamp_(_LEAST, _MOST)


def applied(multipliers: Sequence[Multipliers], weight: QuantizedWeight) -> QuantizedWeight:
    """`weight` with all of them."""
    for each in multipliers:
        weight = each.applied(weight)
    return weight
