"""Training that goes on from codes that a solver has chosen."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from pennyweight.formats.integer import Int
from pennyweight.models.network import QuantizedNetwork
from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.quantized import grouped
from pennyweight.train.qat.prepared import trained_sites

# Of the distance to where the next code begins: nearer to it no weight starts.
_INSIDE = 0.98


def start_from_codes_(model: fx.GraphModule, start: QuantizedNetwork) -> None:
    """Move each weight of `model` to the nearest number that rounds to its code in `start`."""
    with torch.no_grad():
        for trained in trained_sites(model):
            weight = start.weights.get(trained.site.name)
            if weight is not None and weight.scheme == trained.rounding.scheme:
                moved = nearest_of_codes(trained.matrix, weight)
                model.get_parameter(trained.site.parameter).copy_(trained.site.tensor(moved))


def nearest_of_codes(w: Tensor, weight: QuantizedWeight) -> Tensor:
    """The numbers nearest to `w` [out, in] of which each rounds to its code in `weight`.

    They lie in (value - zero ± 1/2) scale, at the end of the codes' range in what is beyond it too; of a number format
    that is a table they are the decoded values.
    """
    element = weight.scheme.element
    if not isinstance(element, Int):
        return weight.dequantize().to(w.dtype)
    values = grouped(element.decode(weight.codes), weight.scheme)
    given = weight.parameters.decoded(weight.scheme)
    zeros = 0.0 if given.zeros is None else given.zeros[..., None]
    scaled = grouped(w.float(), weight.scheme) / given.scales[..., None] + zeros
    low = torch.where(values == element.smallest, -torch.inf, values - _INSIDE / 2)
    high = torch.where(values == element.largest, torch.inf, values + _INSIDE / 2)
    moved = (torch.minimum(torch.maximum(scaled, low), high) - zeros) * given.scales[..., None]
    return moved.reshape(w.shape).to(w.dtype)
