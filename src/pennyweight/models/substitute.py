"""Running a block with other weights than its own, differentiably, without touching it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Substituted(TorchFunctionMode):
    """While active in a thread: `values[id(parameter)]` stands wherever that parameter is given to a torch function.

    It belongs to the thread, so that several may run one module with different values at the same time. Modes around it
    see the values.
    """

    def __init__(self, values: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._replaced(args), **self._replaced(kwargs or {}))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return self._values.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(self._replaced(item) for item in value)
        if type(value) is dict:
            return {key: self._replaced(item) for key, item in value.items()}
        return value
