"""What an optimizer is told of each kind of parameter."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pennyweight.train.qat.activations import ActivationRounding
from pennyweight.train.qat.prepared import unwrapped
from pennyweight.train.qat.weights import WeightRounding

OptimizerName = Literal["sgd", "adamw"]


def parameter_groups(model: nn.Module, *, rate: float, decay: float, optimizer: OptimizerName) -> list[dict[str, Any]]:
    """Groups for a torch optimizer over a prepared `model`: weights decay; norms, biases and steps do not.

    SGD gives steps the same `rate`, as LSQ's scaled gradients want it. AdamW moves each number by `rate` whatever its
    gradient is, so each step gets a rate of its own, `rate` times its size.
    """
    inner = unwrapped(model)
    steps: dict[Tensor, Tensor] = {}
    for module in inner.modules():
        if isinstance(module, WeightRounding | ActivationRounding):
            steps |= {one: module.step for one in (module.step, module.offset) if one is not None}
    others = [one for one in inner.parameters() if one.requires_grad and one not in steps]
    groups: list[dict[str, Any]] = [
        {"params": [one for one in others if one.ndim > 1], "lr": rate, "weight_decay": decay},
        {"params": [one for one in others if one.ndim <= 1], "lr": rate, "weight_decay": 0.0},
    ]
    if optimizer == "sgd":
        groups.append({"params": list(steps), "lr": rate, "weight_decay": 0.0})
    else:
        groups += [
            {"params": [one], "lr": rate * float(step.detach().mean()), "weight_decay": 0.0}
            for one, step in steps.items()
        ]
    return [group for group in groups if group["params"]]


def optimizer_of(
    model: nn.Module, *, rate: float, decay: float, momentum: float, optimizer: OptimizerName
) -> torch.optim.Optimizer:
    """SGD with Nesterov's momentum, or AdamW with the usual betas."""
    groups = parameter_groups(model, rate=rate, decay=decay, optimizer=optimizer)
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0)
    return torch.optim.AdamW(groups, lr=rate)
