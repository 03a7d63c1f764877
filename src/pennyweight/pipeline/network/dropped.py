"""QDrop: each element of a value is rounded with some probability, anew in every step.

Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization" (2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pennyweight.schemes.activation import ActivationParameters

# A chance is a number of 256ths: eight bytes come from one draw.
_CHANCES = 256


class _Dropped(torch.autograd.Function):
    """x̃ = u Q(x) + (1 - u) x; dx̃/dx = 1, but 0 where u = 1 and x lies outside the range of Q (straight through).

    u is a float mask of 0 and 1: torch.where on random masks takes ten times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: ActivationParameters, mask: Tensor | None) -> Tensor:
        rounded = parameters.round_trip(x)
        kept = (x.clamp(parameters.low, parameters.high) == x).to(x.dtype)
        ctx.save_for_backward(kept if mask is None else kept.sub_(1).mul_(mask).add_(1))
        return rounded if mask is None else x.lerp(rounded, mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return gradients[0] * kept, None, None


def dropped(x: Tensor, parameters: ActivationParameters, mask: Tensor | None) -> Tensor:
    """`x` float32 rounded where `mask` is 1, everywhere where it is None."""
    result: Tensor = _Dropped.apply(x, parameters, mask)  # type: ignore[no-untyped-call]
    return result


def chance(shape: torch.Size, probability: float, generator: torch.Generator) -> Tensor | None:
    """float32: 1 with `probability`, rounded to 256ths, else 0; None for ones everywhere."""
    level = round(probability * _CHANCES)
    if level >= _CHANCES:
        return None
    count = shape.numel()
    drawn = torch.empty(-(-count // 8), dtype=torch.int64)
    drawn.random_(-(2**63), None, generator=generator)
    return (drawn.view(torch.uint8)[:count] < level).to(torch.float32).view(shape)
