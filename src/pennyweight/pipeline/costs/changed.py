"""The loss of a model in which a few sites are changed, run again only from the first of them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pennyweight.models.base import Site
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.costs.base import Tell, named_sites
from pennyweight.pipeline.costs.compared import compared
from pennyweight.pipeline.costs.rounded import original_weights, statistics
from pennyweight.pipeline.kept import KeptStates, kept_states
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import Scheme

# Given a site, its original weight [out, in], its statistics and the number of a variant: its weight in that.
Changed = Callable[[Site, Tensor, SiteStatistics, int], Tensor]


# Given the original, the sites of a group and its schemes: the cost of each.
OfGroup = Callable[["Original", Sequence[Site], Sequence[Scheme | None]], list[float]]


@dataclass(frozen=True)
class Original:
    """The original model on its batches: what each block is given, and what the last one gives, on disk."""

    model: StreamedModel
    stream: Stream
    kept: KeptStates

    def losses(self, sites: Sequence[Site], variants: int, changed: Changed) -> list[float]:
        """The mean loss over the tokens of each of `variants` models in which `sites` alone are `changed`; float32."""
        first = min(site.block for site in sites)
        self.kept.take(first, self.stream)
        streams = [self.stream.branched() for _ in range(variants)]
        for index in range(first, len(self.model.blocks)):
            here = {site.name: site for site in sites if site.block == index}
            with self.model.opened(index) as block:
                self._through(block, index, streams, here, changed)
        self.kept.take(len(self.model.blocks), self.stream)
        return self._finished(streams, [site for site in sites if site.kind == "head"], changed)

    def _through(
        self, block: nn.Module, index: int, streams: Sequence[Stream], sites: Mapping[str, Site], changed: Changed
    ) -> None:
        """Bring each variant through the opened block, in which `sites` are changed."""
        weights = {name: w.clone() for name, w in original_weights(self.model, sites).items()}
        found: dict[str, SiteStatistics] = {}
        if sites:
            self.kept.take(index, self.stream)
            found = statistics(self.model, block, index, self.stream, hands_on=False)
        for variant, stream in enumerate(streams):
            for name, site in sites.items():
                self.model.matrix(site).copy_(changed(site, weights[name], found[name], variant))
            self.model.advance(block, index, stream)

    def _finished(self, streams: Sequence[Stream], heads: Sequence[Site], changed: Changed) -> list[float]:
        """The loss of each variant behind the last block, where the head, if it is among the sites, is changed."""
        if not heads:
            return compared(self.model, self.stream, streams)
        [head] = heads
        index, parameter = head.block, self.model.places[head.name].parameter
        with self.model.opened(index) as block:
            w = original_weights(self.model, {head.name: head})[head.name]
            found = statistics(self.model, block, index, self.stream, hands_on=False)[head.name]
            # One after the other: a head is large.
            return [
                loss
                for variant, stream in enumerate(streams)
                for loss in compared(
                    self.model, self.stream, [stream], given={parameter: changed(head, w, found, variant)}
                )
            ]


def each_group(
    model: StreamedModel,
    batches: Sequence[Tensor],
    groups: Sequence[Candidates],
    scratch: Path,
    cost: OfGroup,
    tell: Tell,
) -> list[list[float]]:
    """What `cost` finds for each of `groups`, all beside one run of the original."""
    named = named_sites(model, groups)
    costs = []
    with original(model, batches, scratch) as reference:
        for done, group in enumerate(groups, start=1):
            costs.append(cost(reference, [named[name] for name in group.sites], group.schemes))
            tell(done, len(groups))
    return costs


@contextmanager
def original(model: StreamedModel, batches: Sequence[Tensor], scratch: Path) -> Iterator[Original]:
    """Run `model` on `batches`; hidden states are kept in float32 in the directory `scratch`, which goes away."""
    stream = model.start(batches)
    with kept_states(model, stream, scratch, torch.float32) as kept:
        for index in range(len(model.blocks)):
            kept.put(index, stream)
            with model.opened(index) as block:
                model.advance(block, index, stream)
        kept.put(len(model.blocks), stream)
        yield Original(model, stream, kept)
