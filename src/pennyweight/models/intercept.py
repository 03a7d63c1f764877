"""Watching and speeding up a model's linear maps while it runs, without touching its code."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pennyweight.kernels.matmul import linear_f32

Seen = Callable[[list[str], Tensor], None]


class Watched:
    """Finds the sites whose matrices lie inside the memory of a weight that a linear map was called with."""

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        placed = sorted((matrix.data_ptr(), name) for name, matrix in matrices.items())
        self._starts = [start for start, _ in placed]
        self._names = [name for _, name in placed]

    def within(self, weight: Tensor) -> list[str]:
        start = weight.data_ptr()
        first = bisect_left(self._starts, start)
        last = bisect_left(self._starts, start + weight.numel() * weight.element_size())
        return self._names[first:last]


class Intercept(TorchFunctionMode):
    """While active in a thread: float32 linear maps on the CPU take the fastest exact path, parameters that are still
    on "meta" are read when they are first used, and `seen(sites, x)` is called for each linear map with its input.
    """

    def __init__(
        self, *, load: Callable[[nn.Parameter], Tensor], watched: Watched | None = None, seen: Seen | None = None
    ) -> None:
        super().__init__()
        self._load = load
        self._watched = watched
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(arg, nn.Parameter) and arg.is_meta for arg in args):
            args = tuple(self._load(arg) if isinstance(arg, nn.Parameter) and arg.is_meta else arg for arg in args)
        if func is nn.functional.linear:
            return self._linear(*args, **kwargs)
        if func is torch.addmm and self._watched is not None and len(args) >= 3:
            self._notify(args[2], args[1])
        elif func in _PRODUCTS and self._watched is not None:
            self._product(args[0], args[1])
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.is_meta:
            weight = self._load(weight)  # type: ignore[arg-type]
        if isinstance(bias, nn.Parameter) and bias.is_meta:
            bias = self._load(bias)
        self._notify(weight, x)
        if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() and _has_fast_linear():
            return linear_f32(x, weight, bias)
        return nn.functional.linear(x, weight, bias)

    def _product(self, x: Tensor, weight: Any) -> None:
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 3):
            return
        if weight.ndim == 2:
            self._notify(weight, x)
            return
        for index in range(weight.shape[0] if x.ndim == 3 and x.shape[0] == weight.shape[0] else 0):
            self._notify(weight[index], x[index])

    def _notify(self, weight: Tensor, x: Tensor) -> None:
        if self._watched is None or self._seen is None:
            return
        names = self._watched.within(weight)
        if names:
            self._seen(names, x.detach().reshape(-1, x.shape[-1]))


_PRODUCTS = {torch.matmul, torch.bmm, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm}


def _has_fast_linear() -> bool:
    return torch.backends.mkldnn.is_available()
