"""A module with a weight as a function of its input, its weight and its bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as f
from torch import Tensor, nn

_PLAIN: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: f.conv1d,
    nn.Conv2d: f.conv2d,
    nn.Conv3d: f.conv3d,
}
_TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: f.conv_transpose1d,
    nn.ConvTranspose2d: f.conv_transpose2d,
    nn.ConvTranspose3d: f.conv_transpose3d,
}


@dataclass(frozen=True)
class Operation:
    """function(x, weight, bias, **settings); of an embedding without a bias."""

    function: Callable[..., Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_bias: bool = True

    @staticmethod
    def of(module: nn.Module) -> Operation:
        """What `module`, one of those that a captured network has, computes."""
        match module:
            case nn.Linear():
                return Operation(f.linear)
            case nn.Embedding():
                return Operation(f.embedding, {"padding_idx": module.padding_idx}, has_bias=False)
        names = ["stride", "padding", "dilation", "groups"]
        if type(module) in _PLAIN:
            return Operation(_PLAIN[type(module)], {name: getattr(module, name) for name in names})
        settings = {name: getattr(module, name) for name in [*names, "output_padding"]}
        return Operation(_TRANSPOSED[type(module)], settings)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.function(x, weight, bias, **self.settings)
