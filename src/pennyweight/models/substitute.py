"""Running a block with other weights than its own, differentiably, without touching it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pennyweight.kernels.matmul import has_fast_linear, linear_f32


class Substituted(TorchFunctionMode):
    """While active in a thread: `values[id(parameter)]` stands wherever that parameter is given to a torch function.

    It belongs to the thread, so that several may run one module with different values at the same time.
    """

    def __init__(self, values: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._replaced(args), self._replaced(kwargs or {})
        if func is nn.functional.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return self._values.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(self._replaced(item) for item in value)
        if type(value) is dict:
            return {key: self._replaced(item) for key, item in value.items()}
        return value


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    is_plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel()
    if not is_plain or not has_fast_linear():
        return nn.functional.linear(x, weight, bias)
    out = _FastLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias  # type: ignore[no-any-return]


class _FastLinear(torch.autograd.Function):
    """y = x wᵀ with dx = dy w and dw = dyᵀ x, all three by `linear_f32`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_f32(x, weight, None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        [dy] = gradients
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dx = linear_f32(dy, weight.T, None) if needs_x else None
        rows = dy.reshape(-1, dy.shape[-1]).T
        dw = linear_f32(rows, x.reshape(-1, x.shape[-1]).T, None) if needs_weight else None
        return dx, dw
