"""Biases beside products of integers: int32 codes whose scale is that of the input times that of the weight's row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pennyweight.schemes import QuantizedWeight
from pennyweight.schemes.activation import ActivationParameters

_INT32 = (1 << 31) - 1
# A bias this many scales large keeps all bits of a float32, and leaves room for the products.
_WHOLE = float(1 << 24)


def bias_codes(bias: Tensor, weight: QuantizedWeight, x: ActivationParameters) -> Tensor:
    """int32 [out]: round(b / (s_x s_w)), ties to even; the scale is a float32 product, as a reader computes it.

    Meaningful only where `fits` is true.
    """
    scale = weight.scales[:, 0].cpu() * torch.tensor(x.scale)
    return (bias.detach().cpu().double() / scale.double()).round().clamp(-_INT32, _INT32).to(torch.int32)


def fits(bias: Tensor | None, weight: QuantizedWeight, x: ActivationParameters) -> bool:
    """Whether bias and products of a row never leave int32, whatever the input: |b| + sum |w| max |x| < 2^31."""
    reach = max(x.element.largest - x.zero, x.zero - x.element.smallest)
    peak = distances(weight).abs().sum(1).double() * reach
    if bias is not None:
        scale = weight.scales[:, 0].cpu() * torch.tensor(x.scale)
        peak = peak + (bias.detach().cpu().double() / scale.double()).abs()
    return bool((peak <= _INT32).all())


def distances(weight: QuantizedWeight) -> Tensor:
    """int32 [out, in]: value - zero point of a weight with integer zero points or none, one or a row."""
    values = weight.scheme.element.decode(weight.codes.cpu()).to(torch.int32)
    return values if weight.zeros is None else values - weight.zeros.cpu().to(torch.int32)


def with_scales_for_bias(weight: QuantizedWeight, bias: Tensor | None, x_scale: float) -> QuantizedWeight:
    """The same numbers with another scale for rows of nothing but zeros, in which their bias is exact.

    Such a row has the scale 1, where nothing says another: its bias would be rounded to whole multiples of s_x.
    """
    if bias is None:
        return weight
    is_dead = (distances(weight) == 0).all(1)
    scales = weight.scales.clone()
    needed = (bias.detach().cpu().float().abs() / (_WHOLE * x_scale)).clamp_min(2.0**-100)
    if scales.shape[0] == len(is_dead):
        scales[is_dead, 0] = needed[is_dead].to(scales)
    elif is_dead.all():
        scales[0, 0] = needed.max()
    return replace(weight, scales=scales)
