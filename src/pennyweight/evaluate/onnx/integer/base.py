"""What the parts of the simulation share: a node of the runtime's graph, and the kernel that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# An input that a node leaves out is None.
Inputs = Sequence[Array | None]

# "integer": an 8-bit kernel, simulated. "exact": values are moved or compared, or each result is one IEEE operation,
# simulated. "float": not simulated; the runtime itself computes the node from the inputs that it is given.
Arithmetic = Literal["integer", "exact", "float"]


@dataclass(frozen=True)
class Node:
    """One operation of the graph that the runtime says it runs."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    proto: Any

    def flag(self, name: str) -> bool:
        return bool(self.attributes.get(name, 0))

    def sizes(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.attributes.get(name) or default)


def always(node: Node, inputs: Inputs) -> bool:
    return True


@dataclass(frozen=True)
class Kernel:
    """How one kind of operation is computed; `covers` says whether it is for this node with these inputs."""

    name: str
    run: Callable[[Node, Inputs], tuple[Array, ...]]
    arithmetic: Arithmetic = "integer"
    covers: Callable[[Node, Inputs], bool] = always


def given(inputs: Inputs, position: int) -> Array:
    """The input at `position`, which the operation can't do without."""
    array = inputs[position]
    assert array is not None
    return array


def optional(inputs: Inputs, position: int) -> Array | None:
    return inputs[position] if position < len(inputs) else None


def number(inputs: Inputs, position: int) -> np.float32:
    """The float32 number at `position`: a scale, stored as a scalar or as one element."""
    return np.float32(given(inputs, position).reshape(()))


def zero_point(inputs: Inputs, position: int) -> int:
    """The zero point at `position`; one that is left out is 0."""
    array = optional(inputs, position)
    return 0 if array is None else int(array.reshape(()))
