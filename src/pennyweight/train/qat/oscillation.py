"""Codes that go to and fro while weights are trained: followed, damped, frozen.

Nagel et al., "Overcoming oscillations in quantization-aware training" (2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pennyweight.train.qat.lsq import FREE
from pennyweight.train.qat.prepared import trained_sites

# Share of the newest step in the averages, and the frequency above which a weight counts as oscillating (section 5.2).
MOMENTUM = 0.01
OSCILLATING = 0.005


@dataclass(frozen=True)
class Oscillations:
    """Of all weights that are rounded: the shares that oscillate, and that are frozen."""

    oscillating: float
    frozen: float


@torch.no_grad()
def follow_codes(model: nn.Module, *, freeze_above: float | None = None, momentum: float = MOMENTUM) -> Oscillations:
    """Say to a prepared `model` that its optimizer has made a step; freeze the codes that turn back too often.

    Called after each step. `freeze_above` is the frequency of turns at which codes are frozen from now on (0.04 falling
    to 0.01 over the training, say), None for none. What is frozen is no longer counted as oscillating.
    """
    weights, counts = 0, []
    for trained in trained_sites(model):
        history = trained.rounding.history
        if history is None:
            continue
        history.update_(trained.rounding.values(trained.matrix, trained.rows), momentum=momentum)
        if freeze_above is not None:
            history.freeze_(freeze_above)
        is_frozen = history.fixed != FREE
        weights += is_frozen.numel()
        counts.append(torch.stack([((history.frequency > OSCILLATING) & ~is_frozen).sum(), is_frozen.sum()]))
    if not counts:
        return Oscillations(0.0, 0.0)
    # Asked once: each answer is waited for on a device.
    oscillating, frozen = torch.stack(counts).sum(0).tolist()
    return Oscillations(oscillating / weights, frozen / weights)


def dampening(model: nn.Module) -> Tensor:
    """sum over all rounded weights of (s (q - z) - clamp(w, s (n - z), s (p - z)))², the centre of the code's cell held
    still: what is added to the loss, times a factor that grows from 0, to keep weights from the edges of cells
    (equation 5)."""
    total = torch.zeros(())
    for trained in trained_sites(model):
        rounding = trained.rounding
        centre = rounding.centred(rounding.values(trained.matrix, trained.rows), trained.rows)
        element = rounding.scheme.element
        ends = [
            rounding.centred(torch.full_like(centre, end), trained.rows) for end in (element.smallest, element.largest)
        ]
        held = torch.clamp(trained.matrix, torch.minimum(*ends), torch.maximum(*ends))
        total = total.to(centre.device) + (centre - held).square().sum()
    return total
