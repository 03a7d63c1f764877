"""A network cut into blocks: runs of its operations behind which one value is all that is handed on.

Where everything that depends on weights passes through a single value, there is a cut: a residual block comes out
whole, for its shortcut passes by everything inside. Values that no weight has touched (an attention mask, a size) do
not count. A part that is too large to be learned at once (a U-Net, whose early values are read at the end) is cut again
where only one of the values made in a run is read behind it, or else behind every site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pennyweight.models.network.network import Network

# Sites of a block that are learned together.
LARGEST = 8
# Sites of a part that is cut again, where it can be.
_SMALL = 4


@dataclass(frozen=True)
class NetworkBlock:
    """nodes    names of the operations, in order
    sites    names of the sites that they compute with first; one that is called again later belongs to the first block
    inputs   values from outside that they read, parameters left out
    outputs  values that are read behind it
    target   the output that says what the block does; None where there is no single one
    """

    nodes: tuple[str, ...]
    sites: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    target: str | None


def partition(network: Network, *, largest: int = LARGEST) -> tuple[NetworkBlock, ...]:
    """All operations that depend on weights, in order, as blocks; those of at most `largest` sites are whole."""
    line = _Line(network)
    parts = _joined_by_path(line, _merged(line, line.parts()))
    runs = [run for part in parts for run in line.split(part, largest)]
    return tuple(line.block(run) for run in runs)


class _Line:
    """The operations that depend on weights in the order of the graph; a part of them is a range of places."""

    def __init__(self, network: Network) -> None:
        computing = {node for site in network.sites for node in site.nodes}
        self.nodes: list[fx.Node] = []
        carried: set[fx.Node] = set()
        for node in network.graph.graph.nodes:
            reads = node.name in computing or any(one in carried for one in node.all_input_nodes)
            if reads and _is_value(node):
                carried.add(node)
                self.nodes.append(node)
        place = {node: index for index, node in enumerate(self.nodes)}
        # The last place that reads each value; the network's outputs are read behind the end.
        self.last = [max((place.get(user, len(place)) for user in node.users), default=-1) for node in self.nodes]
        named = {node.name: index for node, index in place.items()}
        self.first_use = {site.name: min(named[node] for node in site.nodes) for site in network.sites}

    def parts(self) -> list[range]:
        """Between places where a single value is alive."""
        ends, start = [], 0
        for end in range(1, len(self.nodes) + 1):
            if end == len(self.nodes) or len(self.alive(range(end))) == 1:
                ends.append(range(start, end))
                start = end
        return ends

    def alive(self, part: range) -> list[int]:
        """Places of values that are made in `part` and read behind it."""
        return [index for index in part if self.last[index] >= part.stop]

    def sites(self, part: range) -> list[str]:
        return [site for site, index in self.first_use.items() if index in part]

    def is_whole(self, part: range) -> bool:
        """One value is handed on."""
        alive = self.alive(part)
        return len(alive) == 1 and self.is_float(alive[0])

    def is_float(self, index: int) -> bool:
        value = self.nodes[index].meta.get("val")
        return isinstance(value, Tensor) and value.is_floating_point()

    def split(self, part: range, largest: int) -> list[range]:
        """`part`, or runs of it of few sites."""
        if len(self.sites(part)) <= largest and self.is_whole(part):
            return [part]
        runs, start = [], part.start
        while start < part.stop:
            end = self._end(range(start, part.stop), largest)
            runs.append(range(start, end))
            start = end
        return runs

    def _end(self, rest: range, largest: int) -> int:
        """Where the next run ends: as far as a few sites go, or a whole run of more, or behind the next site."""
        ends = [range(rest.start, end) for end in range(rest.start + 1, rest.stop + 1)]
        for limit in (_SMALL, largest):
            fitting = [run.stop for run in ends if 0 < len(self.sites(run)) <= limit and self.is_whole(run)]
            if fitting:
                return max(fitting)
        return next((run.stop for run in ends if self.sites(run)), rest.stop)

    def block(self, run: range) -> NetworkBlock:
        inside = set(self.nodes[run.start : run.stop])
        read = [one for node in self.nodes[run.start : run.stop] for one in node.all_input_nodes]
        inputs = dict.fromkeys(one.name for one in read if one not in inside and one.op != "get_attr")
        alive, sites = self.alive(run), self.sites(run)
        if self.is_whole(run):
            target: str | None = self.nodes[alive[0]].name
        else:
            # Cut behind a site: its own value.
            last = run.stop - 1
            target = self.nodes[last].name if last in alive and self.is_float(last) and sites else None
        return NetworkBlock(
            tuple(node.name for node in self.nodes[run.start : run.stop]),
            tuple(sites),
            tuple(inputs),
            tuple(self.nodes[index].name for index in alive),
            target,
        )


def _is_value(node: fx.Node) -> bool:
    """Computed, and not a size: those do not depend on what the numbers are."""
    value = node.meta.get("val")
    return node.op in ("call_function", "call_module") and not isinstance(value, int | torch.SymInt)


def _merged(line: _Line, parts: Sequence[range]) -> list[range]:
    """Parts without sites go to the part before where they change no shape (ReLU), else to the one behind (a pool)."""
    found: list[range] = []
    waiting: int | None = None
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        if line.sites(part):
            found.append(range(part.start if waiting is None else waiting, part.stop))
            waiting = None
        elif found and waiting is None and not is_last and _keeps_shape(line, part):
            found[-1] = range(found[-1].start, part.stop)
        elif waiting is None:
            waiting = part.start
    if waiting is not None:
        found.append(range(waiting, len(line.nodes)))
    return found


def _keeps_shape(line: _Line, part: range) -> bool:
    before, after = (line.nodes[index].meta.get("val") for index in (part.start - 1, part.stop - 1))
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape


def _joined_by_path(line: _Line, parts: Sequence[range]) -> list[range]:
    """Parts of one site each that are all the sites of one module become one part."""
    sites = [line.sites(part) for part in parts]
    found: list[range] = []
    index = 0
    while index < len(parts):
        count = _together(sites, index)
        found.append(range(parts[index].start, parts[index + count - 1].stop))
        index += count
    return found


def _together(sites: Sequence[Sequence[str]], index: int) -> int:
    """How many parts from `index` on are one site each and all of the largest module that is no larger than a block."""
    if len(sites[index]) != 1:
        return 1
    every = [name for part in sites for name in part]
    path, best = sites[index][0], 1
    while "." in path:
        path = path.rpartition(".")[0]
        under = [name for name in every if name.startswith(f"{path}.")]
        if len(under) > _SMALL:
            break
        if [name for part in sites[index : index + len(under)] for name in part] == under and all(
            len(part) == 1 for part in sites[index : index + len(under)]
        ):
            best = len(under)
    return best
