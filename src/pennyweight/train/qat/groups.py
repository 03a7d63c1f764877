"""What an optimizer is told of each kind of parameter."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from pennyweight.train.qat.activations import ActivationRounding
from pennyweight.train.qat.prepared import unwrapped
from pennyweight.train.qat.weights import WeightRounding

OptimizerName = Literal["sgd", "adamw"]


def parameter_groups(model: nn.Module, *, decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer over a prepared `model`: weights decay; norms, biases and steps do not."""
    inner = unwrapped(model)
    roundings = [one for one in inner.modules() if isinstance(one, WeightRounding | ActivationRounding)]
    steps = {parameter for rounding in roundings for parameter in rounding.parameters()}
    trained = [one for one in inner.parameters() if one.requires_grad]
    decaying = [one for one in trained if one.ndim > 1 and one not in steps]
    others = [one for one in trained if one.ndim <= 1 or one in steps]
    groups = [{"params": decaying, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def optimizer_of(
    model: nn.Module, *, rate: float, decay: float, momentum: float, optimizer: OptimizerName
) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or AdamW with the usual betas."""
    groups = parameter_groups(model, decay=decay)
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0)
    return torch.optim.AdamW(groups, lr=rate)
