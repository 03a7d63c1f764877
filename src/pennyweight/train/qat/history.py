"""How the codes of a matrix change while it is trained.

Nagel et al., "Overcoming oscillations in quantization-aware training" (2022), section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.train.qat.lsq import FREE


class History(nn.Module):
    """What has happened to each code of a matrix [out, in].

    previous   int16: its value after the last step
    direction  int8: where its last change went, 0 before any
    frequency  float32: f <- m o + (1 - m) f, with o = 1 where a change goes against the last one, else 0
    average    float32: of its value, with the same m
    fixed      int16: the value at which it stays, FREE where it may change
    steps      int64 []: how many there were
    """

    previous: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    fixed: Tensor
    steps: Tensor

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.register_buffer("previous", torch.zeros(shape, dtype=torch.int16, device=device))
        self.register_buffer("direction", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("frequency", torch.zeros(shape, device=device))
        self.register_buffer("average", torch.zeros(shape, device=device))
        self.register_buffer("fixed", torch.full(shape, FREE, dtype=torch.int16, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def update_(self, values: Tensor, *, momentum: float) -> None:
        """After a step, with the value of each code as it would be now. The first call only begins the history."""
        if self.steps == 0:
            self.average.copy_(values)
        else:
            change = (values - self.previous).sign_().to(torch.int8)
            turned = change * self.direction < 0
            self.frequency.lerp_(turned.float(), momentum)
            self.average.lerp_(values, momentum)
            self.direction.copy_(torch.where(change == 0, self.direction, change))
        self.previous.copy_(values)
        self.steps += 1

    def freeze_(self, above: float) -> None:
        """From now on a code whose frequency is `above` that has the value at which it was on average, rounded."""
        chosen = (self.frequency > above) & (self.fixed == FREE)
        self.fixed.copy_(torch.where(chosen, self.average.round().to(torch.int16), self.fixed))
