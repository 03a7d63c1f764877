"""What passes from block to block of a network, batch by batch: in float, and behind rounded blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from pennyweight.core.parallel import parallel_map
from pennyweight.models.network.blocks import NetworkBlock
from pennyweight.models.network.network import Inputs, Network
from pennyweight.models.network.part import Changed, Parts, Recorder, unchanged
from pennyweight.schemes.activation import ActivationParameters


class Streams:
    """exact    for each batch, the values that blocks still to come read, in the float network
    rounded  the same behind the blocks as they are rounded, values on edges rounded
    """

    def __init__(
        self,
        network: Network,
        parts: Parts,
        blocks: Sequence[NetworkBlock],
        batches: Sequence[Inputs],
        activations: Mapping[str, ActivationParameters],
    ) -> None:
        self._parts, self._round = parts, rounding(activations)
        self._last = {name: number for number, block in enumerate(blocks) for name in block.inputs}
        self._number = 0
        made = {name for block in blocks for name in block.nodes}
        # What no weight has touched is the same in both, and there from the start.
        given = frozenset(self._last) - made
        self.exact = [Recorder.values(network, inputs, given) for inputs in batches]
        self.rounded = [
            {name: self._round(name, value) if _is_real(value) else value for name, value in values.items()}
            for values in self.exact
        ]

    def targets(self, block: NetworkBlock) -> list[dict[str, Any]]:
        """In the float network, what is read behind `block` and what its target is, batch by batch."""
        wanted = {*self._read_behind(), block.target}

        def one(values: Mapping[str, Any]) -> dict[str, Any]:
            return _only(wanted, self._parts.run(block.nodes, values, weights={}))

        return parallel_map(one, self.exact)

    def advance(self, block: NetworkBlock, exact: Sequence[Mapping[str, Any]], weights: Mapping[str, Tensor]) -> None:
        """Leave `block` behind: `exact` is what `targets` gave, `weights` those of the rounded network."""
        wanted = self._read_behind()

        def one(values: Mapping[str, Any]) -> dict[str, Any]:
            return _only(wanted, self._parts.run(block.nodes, values, weights=weights, changed=self._round))

        self.rounded = parallel_map(one, self.rounded)
        self.exact = [_only(wanted, values) for values in exact]
        self._number += 1

    def _read_behind(self) -> set[str]:
        """Values that some block behind the one at hand reads."""
        return {name for name, last in self._last.items() if last > self._number}


def _only(names: Collection[str | None], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def rounding(activations: Mapping[str, ActivationParameters]) -> Changed:
    """Values on edges as their readers see them."""

    def changed(name: str, value: Tensor) -> Tensor:
        return activations[name].round_trip(value) if name in activations else unchanged(name, value)

    return changed


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cut(network: Network, batches: Sequence[Any], *, rows: int, elements: int) -> list[Inputs]:
    """`batches` in pieces of at most `rows` along the first axis, fewer where `elements` numbers would go in at once;
    as they are where the network allows no other size."""
    given = [network.inputs(batch) for batch in batches]
    if not network.batch_varies:
        return given
    return [piece for inputs in given for piece in _pieces(inputs, rows, elements)]


def _pieces(inputs: Inputs, rows: int, elements: int) -> list[Inputs]:
    tensors = inputs.tensors
    count = len(tensors[0])
    each = max(1, sum(tensor.numel() for tensor in tensors) // max(1, count))
    size = max(1, min(rows, elements // each))

    def piece(start: int) -> Inputs:
        def part(value: Any) -> Any:
            return value[start : start + size] if isinstance(value, Tensor) else value

        return Inputs(*pytree.tree_map(part, (inputs.args, dict(inputs.kwargs))))

    return [piece(start) for start in range(0, count, size)]


def largest_batch(batches: Sequence[Inputs]) -> int:
    """Rows of the largest of `batches`."""
    return max((len(inputs.tensors[0]) for inputs in batches if inputs.tensors[0].dim()), default=1)
