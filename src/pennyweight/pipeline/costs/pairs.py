"""What each site of a block is called with, and the loss's gradient with respect to what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pennyweight.models.base import Site
from pennyweight.models.sites import Place


@dataclass(frozen=True)
class Pair:
    """One call: rows `x` [rows, in] and dl/dz `slopes` [rows, out] for z = x Wᵀ. The rows are those of so many
    `windows`, one after the other; None: only some of their tokens', as an expert's."""

    x: Tensor
    slopes: Tensor
    windows: int | None


@dataclass
class Pairs:
    """Collects the pairs of one batch: inputs as it runs, slopes while its graph is gone through backwards.

    shape   windows of the batch, and tokens of each
    found   site -> its calls; none where the loss does not depend on what it gives
    rows    site -> rows that it was called with
    """

    sites: Mapping[str, Site]
    places: Mapping[str, Place]
    shape: tuple[int, int]
    found: dict[str, list[Pair]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    _given: dict[str, Tensor] = field(default_factory=dict)
    # Inputs are copied, for a block that changes its tensors in place: once for all sites that share one.
    _copies: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def seen(self, names: list[str], x: Tensor) -> bool:
        """Note the input of `names`; what they give is needed."""
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x._version)
        # The tensor itself is held so that no other can take its memory, and so its key.
        _, copy = self._copies.setdefault(key, (x, x.reshape(-1, x.shape[-1]).clone()))
        for name in names:
            self._given[name] = copy
            self.rows[name] = self.rows.get(name, 0) + copy.shape[0]
        return False

    def made(self, names: list[str], out: Tensor) -> None:
        """Wait for the gradient of what `names` give."""
        given = {name: self._given.pop(name) for name in names if name in self._given}
        parts = {name: part for name in given if (part := self._part(name, names, out)) is not None}
        for name in parts:
            self.found.setdefault(name, [])
        if not out.requires_grad:
            return

        def slope(dz: Tensor) -> None:
            for name, (index, columns) in parts.items():
                own = (dz if index is None else dz[index])[..., columns].detach().float()
                windows = self._windows(name, given[name])
                self.found[name].append(Pair(given[name], own.reshape(-1, own.shape[-1]), windows))

        out.register_hook(slope)  # type: ignore[no-untyped-call]

    def _part(self, name: str, names: Sequence[str], out: Tensor) -> tuple[int | None, slice] | None:
        """Which matrix of a stack, and which columns, of `out` are those of the site; None where that can't be seen."""
        place, rows = self.places[name], self.sites[name].shape[0]
        is_stack = len({self.places[other].index for other in names}) > 1
        index = place.index if is_stack else None
        if out.shape[-1] == rows:
            return index, slice(0, rows)
        if place.rows is not None and place.rows[1] <= out.shape[-1]:
            return index, slice(*place.rows)
        return None

    def _windows(self, name: str, x: Tensor) -> int | None:
        windows, tokens = self.shape
        is_whole = self.sites[name].kind != "expert" and x.shape[0] == windows * tokens
        return windows if is_whole else None

    def close(self) -> None:
        """Let go of what only the pass itself needed."""
        self._copies.clear()
        self._given.clear()
