"""Running calibration data through a block and holding on to what its sites are called with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from pennyweight.models.base import Site
from pennyweight.models.intercept import Seen, Watched
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel

# Tokens whose activations are held at once: a constant, so that sums are cut alike on every machine.
_ROUND_TOKENS = 2048


@dataclass
class Inputs:
    """What one batch showed.

    leaders  site -> the site whose input it shares, itself if it was called first
    inputs   leader -> its inputs [..., in], and the versions that these tensors had when it was called
    copied   whether `inputs` are copies, for a block that changes its tensors in place
    held     what was copied: no other input can take its memory, and so its key, while the batch runs
    awaited  sites that have not been called, where the pass is of no use once all have; None where its output is needed
    returned_to   whether a site was called after that
    """

    copied: bool
    awaited: set[str] | None = None
    returned_to: bool = False
    leaders: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)

    @property
    def is_overwritten(self) -> bool:
        return any(x._version != version for seen in self.inputs.values() for x, version in seen)

    def take(self, leader: str) -> list[Tensor]:
        """The inputs of `leader` as matrices [tokens, in], which are let go of."""
        return [x.reshape(-1, x.shape[-1]) for x, _ in self.inputs.pop(leader, [])]


def rounds(stream: Stream) -> list[list[int]]:
    """Batches whose activations are held together."""
    found: list[list[int]] = [[]]
    tokens = 0
    for batch, ids in enumerate(stream.input_ids):
        if tokens and tokens + ids.numel() > _ROUND_TOKENS:
            found.append([])
            tokens = 0
        found[-1].append(batch)
        tokens += ids.numel()
    return found


class Observer:
    """Runs block `index`, or a copy of it, on batches of a stream and gives what `sites` of it saw, and its outputs.

    Where no outputs are needed, nothing is computed from the call of the last of these sites on.
    """

    def __init__(
        self, model: StreamedModel, block: nn.Module, index: int, sites: Sequence[Site], *, needs_outputs: bool = True
    ) -> None:
        self._model = model
        self._block = block
        self._index = index
        self._watched: Watched = model.watched(model.sites_of(index), block)
        self._wanted = {site.name for site in sites}
        self._awaits = not needs_outputs
        # Learnt from the first batch that shows it.
        self._copies = False

    def run(self, stream: Stream, batches: Sequence[int]) -> tuple[list[Inputs], list[Tensor]]:
        """Inputs and outputs of `batches`, which run in parallel; both in their order."""
        found, outputs = self._once(stream, batches)
        if any(batch.returned_to for batch in found):
            self._awaits = False
            found, outputs = self._once(stream, batches)
        if any(batch.is_overwritten for batch in found):
            self._copies = True
            found, outputs = self._once(stream, batches)
        return found, outputs

    def _once(self, stream: Stream, batches: Sequence[int]) -> tuple[list[Inputs], list[Tensor]]:
        found = {batch: Inputs(self._copies, {*self._wanted} if self._awaits else None) for batch in batches}
        outputs = self._model.run_block(
            self._block,
            self._index,
            stream,
            seen=lambda batch: _noting(found[batch], self._wanted),
            watched=self._watched,
            batches=batches,
        )
        return [found[batch] for batch in batches], outputs


def _noting(found: Inputs, wanted: Collection[str]) -> Seen:
    leader_of: dict[tuple[object, ...], str] = {}

    def seen(called: list[str], x: Tensor) -> bool:
        names = [name for name in called if name in wanted]
        if not names:
            return found.awaited is not None and not found.awaited
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x._version)
        leader = leader_of.setdefault(key, names[0])
        if leader == names[0]:
            if found.copied:
                found.held.append(x)
            kept = x.clone() if found.copied else x
            found.inputs.setdefault(leader, []).append((kept, kept._version))
        for name in names:
            found.leaders.setdefault(name, leader)
        if found.awaited is None:
            return False
        found.returned_to |= not found.awaited
        found.awaited.difference_update(names)
        return not found.awaited

    return seen
