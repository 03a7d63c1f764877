"""Names of scales, of which several may turn out to be one, and some to be fixed at 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Names of elements that carry no scale: constants, and exact zeros, which any scale leaves alone.
FIXED, ZERO = 0, -1


class Names:
    """Numbers from 1 on, joined in sets (union-find); tensors of them, int64, name the elements of a value."""

    def __init__(self) -> None:
        self._parent = [FIXED]
        # Root -> why its set has no scale of its own.
        self._why: dict[int, str] = {}

    def fresh(self, count: int) -> Tensor:
        """New names [count]."""
        start = len(self._parent)
        self._parent += range(start, start + count)
        return torch.arange(start, start + count)

    def fix(self, names: Tensor, why: str) -> None:
        """Nothing that carries one of `names` may be scaled; the first reason is kept."""
        for name in torch.unique(names[names > FIXED]).tolist():
            self._why.setdefault(self._root(name), why)

    def joined(self, one: Tensor, other: Tensor, why: str) -> Tensor:
        """Names that broadcast against each other, made one element by element; `why` is said where one is fixed."""
        one, other = one + torch.zeros_like(other), other + torch.zeros_like(one)
        if torch.equal(one, other):
            return one
        count = len(self._parent) + 1
        pairs = torch.unique((one - ZERO) * count + (other - ZERO))
        for first, second in torch.stack([pairs // count + ZERO, pairs % count + ZERO], 1).tolist():
            self._join(first, second, why)
        return torch.maximum(one, other)

    def alike(self, names: Tensor, why: str) -> Tensor:
        """One name [n] for each row of `names` [n, m]: all of a row are made one."""
        if names.shape[1] == 0:
            return torch.full((names.shape[0],), ZERO)
        last = names.amax(1)
        for row in (names != last[:, None]).any(1).nonzero().flatten().tolist():
            for name in torch.unique(names[row]).tolist():
                self._join(name, int(last[row]), why)
        return last

    def are_fixed(self, names: Tensor) -> bool:
        """No element carries a scale."""
        return all(self._root(name) in self._why for name in torch.unique(names[names > FIXED]).tolist())

    def why(self, name: int) -> str | None:
        """Why it is fixed; None where it is not."""
        return self._why.get(self._root(name))

    def numbered(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        """The tensors with one number from 1 on for each set that has a scale and 0 otherwise; how many with 0."""
        numbers: dict[int, int] = {}
        table = torch.zeros(len(self._parent), dtype=torch.int64)
        for name in range(1, len(self._parent)):
            root = self._root(name)
            if root not in self._why:
                table[name] = numbers.setdefault(root, len(numbers) + 1)
        return [table[names.clamp_min(FIXED)] for names in tensors], len(numbers) + 1

    def _root(self, name: int) -> int:
        while self._parent[name] != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def _join(self, one: int, other: int, why: str) -> None:
        if ZERO in (one, other) or one == other:
            return
        if FIXED in (one, other):
            self._why.setdefault(self._root(max(one, other)), why)
            return
        first, second = self._root(one), self._root(other)
        if first == second:
            return
        self._parent[second] = first
        reason = self._why.pop(second, None)
        if reason is not None:
            self._why.setdefault(first, reason)
