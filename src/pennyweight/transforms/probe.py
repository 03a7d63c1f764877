"""Watching the linear maps of a block, and changing what goes into them and comes out of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.kernels.matmul import PRODUCTS

# Runs a module in place of the block that it stands for, on a small input; returns the block's output.
Run = Callable[[nn.Module], Tensor]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearMap:
    """A parameter as the matrix of a linear map y = x Wᵀ + b; stacked experts are one map.

    axis  the inputs' axis in the parameter, -1 or -2; the outputs' axis is the other one
    bias  the parameter that is added in the same call
    """

    parameter: str
    axis: int
    bias: str | None

    @property
    def out_axis(self) -> int:
        return -3 - self.axis


@dataclass(frozen=True)
class Trace:
    """What a block gave, which linear maps it called, and the inputs [rows, in] of each, in the order of the calls."""

    output: Tensor
    maps: dict[str, LinearMap]
    inputs: dict[str, list[Tensor]]


def trace(
    block: nn.Module, run: Run, *, before: Mapping[str, Change] | None = None, after: Mapping[str, Change] | None = None
) -> Trace:
    """Run the block; inputs of the parameters in `before` and outputs of those in `after` are changed on the way.

    The inputs that are returned are those before any change.
    """
    probe = _Probe(block, before or {}, after or {})
    with torch.no_grad(), one_thread_per_operation():
        output = run(_Probed(block, probe))
    return Trace(output, probe.maps, probe.inputs)


class _Probed(nn.Module):
    def __init__(self, block: nn.Module, probe: _Probe) -> None:
        super().__init__()
        self._block = block
        self._probe = probe

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._probe:
            return self._block(*args, **kwargs)


class _Probe(TorchFunctionMode):
    """Parameters are recognised by their memory, so that views and slices of them are too."""

    def __init__(self, block: nn.Module, before: Mapping[str, Change], after: Mapping[str, Change]) -> None:
        super().__init__()
        self._parameters = dict(block.named_parameters())
        self._places = sorted(
            (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name) for name, p in self._parameters.items()
        )
        self._before, self._after = before, after
        self.maps: dict[str, LinearMap] = {}
        self.inputs: dict[str, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            return self._linear(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs:
            return self._called(func, args, x=1, in_stride=args[2].stride(-2), weight=args[2], bias=args[0])
        if func in PRODUCTS and len(args) == 2 and _is_matrix(args[1]):
            return self._called(func, args, x=0, in_stride=args[1].stride(-2), weight=args[1], bias=None)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
        args = (input, weight, bias)
        return self._called(nn.functional.linear, args, x=0, in_stride=weight.stride(-1), weight=weight, bias=bias)

    def _called(self, func: Any, args: Any, *, x: int, in_stride: int, weight: Tensor, bias: Any) -> Any:
        name = self._named(weight)
        if name is None or not isinstance(args[x], Tensor):
            return func(*args)
        axis = -1 if self._parameters[name].stride(-1) == in_stride else -2
        self.maps[name] = LinearMap(name, axis, self._named(bias))
        rows = args[x].detach().reshape(-1, args[x].shape[-1])
        self.inputs.setdefault(name, []).append(rows.to("cpu", copy=True))
        change = self._before.get(name)
        given = args if change is None else (*args[:x], change(args[x]), *args[x + 1 :])
        out = func(*given)
        after = self._after.get(name)
        return out if after is None else after(out)

    def _named(self, tensor: Any) -> str | None:
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return None
        start = tensor.data_ptr()
        place = bisect_right(self._places, start, key=lambda known: known[0]) - 1
        inside = place >= 0 and start < self._places[place][1]
        return self._places[place][2] if inside else None


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim in (2, 3)
