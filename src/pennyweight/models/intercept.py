"""Watching and speeding up a model's linear maps while it runs, without touching its code."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pennyweight.kernels.matmul import PRODUCTS, has_fast_linear, linear_f32

# Told the names of sites and the input [..., in] that they are called with; says whether what the map would give is
# needed by nobody: zeros then take its place.
Seen = Callable[[list[str], Tensor], bool]
# Told the names of sites and the output [..., out] that they give, as it is in the graph: that of a slice for each
# matrix in it, that of a stack [experts, tokens, out] for all experts.
Made = Callable[[list[str], Tensor], None]


class Watched:
    """Finds the sites whose matrices lie inside the memory of a weight that a linear map was called with.

    With `is_narrow` these maps are computed in bfloat16, with copies of the weights that are kept for one pass over the
    block: calibration of a bfloat16 model then sees what its runtime computes, twice as fast on some processors.
    """

    def __init__(self, matrices: Mapping[str, Tensor], *, is_narrow: bool = False) -> None:
        placed = sorted((matrix.data_ptr(), name) for name, matrix in matrices.items())
        self._starts = [start for start, _ in placed]
        self._names = [name for _, name in placed]
        self._is_narrow = is_narrow
        self._narrowed: dict[tuple[object, ...], Tensor] = {}

    def within(self, weight: Tensor) -> list[str]:
        start = weight.data_ptr()
        first = bisect_left(self._starts, start)
        last = bisect_left(self._starts, start + weight.numel() * weight.element_size())
        return self._names[first:last]

    def narrowed(self, weight: Tensor) -> Tensor | None:
        """The weight in bfloat16 where it is a site's and the pass is narrow."""
        if not self._is_narrow or weight.dtype != torch.float32 or not self.within(weight):
            return None
        # A slice of a fused weight may begin where the whole does.
        key = (weight.data_ptr(), tuple(weight.shape), weight.stride())
        if key not in self._narrowed:
            self._narrowed[key] = weight.bfloat16()
        return self._narrowed[key]


class Intercept(TorchFunctionMode):
    """While active in a thread: float32 linear maps on the CPU take the fastest exact path, parameters that are still
    on "meta" are read when they are first used, `seen(sites, x)` is called for each linear map with its input, in
    the type in which the map is computed, and `made(sites, y)` with its output, which is that of all of them.
    """

    def __init__(
        self,
        *,
        load: Callable[[nn.Parameter], Tensor],
        watched: Watched | None = None,
        seen: Seen | None = None,
        made: Made | None = None,
        load_rows: Callable[[nn.Parameter, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._load = load
        self._watched = watched
        self._seen = seen
        self._made = made
        self._load_rows = load_rows
        self._rounded: tuple[Tensor, int, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding and self._load_rows is not None:
            found = self._embedding(*args, **kwargs)
            if found is not None:
                return found
        if func not in _KNOWN_WITHOUT_READING:
            args = self._loaded(args)
            kwargs = self._loaded(kwargs)
        if func is nn.functional.linear:
            return self._linear(*args, **kwargs)
        weight = None
        if func is torch.addmm and self._watched is not None and len(args) >= 3:
            weight = args[2]
            self._notify(weight, args[1])
        elif func in PRODUCTS and self._watched is not None:
            weight = args[1]
            self._product(args[0], weight)
        out = func(*args, **kwargs)
        return out if weight is None else self._handed_on(weight, out)

    def _loaded(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return self._load(value) if value.is_meta else value
        if type(value) in (tuple, list):
            return type(value)(self._loaded(item) for item in value)
        if type(value) is dict:
            return {key: self._loaded(item) for key, item in value.items()}
        return value

    def _embedding(
        self, ids: Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
    ) -> Tensor | None:
        """A look-up that reads no more of the table than the rows it needs; None where it is not as plain as that."""
        if not isinstance(weight, nn.Parameter) or not weight.is_meta or self._load_rows is None:
            return None
        if max_norm is not None:
            return None
        rows, places = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        return self._load_rows(weight, rows)[places]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._handed_on(weight, self._mapped(x, weight, bias))

    def _mapped(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        narrow = None if self._watched is None else self._watched.narrowed(weight)
        if narrow is not None:
            x = self._in_bfloat16(x)
        if self._notify(weight, x):
            return torch.zeros(*x.shape[:-1], weight.shape[0], dtype=weight.dtype, device=x.device)
        if narrow is not None:
            out = nn.functional.linear(x, narrow).float()
            return out if bias is None else out.add_(bias)
        if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() and has_fast_linear():
            return linear_f32(x, weight, bias)
        return nn.functional.linear(x, weight, bias)

    def _in_bfloat16(self, x: Tensor) -> Tensor:
        """Maps that are called with the same input after one another share its rounding."""
        last = self._rounded
        if last is None or last[0] is not x or last[1] != x._version:
            self._rounded = last = (x, x._version, x.bfloat16())
        return last[2]

    def _product(self, x: Tensor, weight: Any) -> None:
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 3):
            return
        if weight.ndim == 2:
            self._notify(weight, x)
            return
        for index in range(weight.shape[0] if x.ndim == 3 and x.shape[0] == weight.shape[0] else 0):
            self._notify(weight[index], x[index])

    def _notify(self, weight: Tensor, x: Tensor) -> bool:
        if self._watched is None or self._seen is None:
            return False
        names = self._watched.within(weight) if x.numel() else []
        return bool(names) and self._seen(names, x.detach())

    def _handed_on(self, weight: Any, out: Tensor) -> Tensor:
        if self._watched is not None and self._made is not None and isinstance(weight, Tensor):
            names = self._watched.within(weight) if weight.ndim in (2, 3) and out.numel() else []
            if names:
                self._made(names, out)
        return out


# Asked of a parameter often, as in `self.dtype`, and answered without its values.
_KNOWN_WITHOUT_READING = {
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    torch.Tensor.is_floating_point,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
}
