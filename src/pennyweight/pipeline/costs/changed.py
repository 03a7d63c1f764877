"""The loss of a model in which a few sites are changed, run again only from the first of them on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pennyweight.core.parallel import parallel_map
from pennyweight.models.base import Site
from pennyweight.models.streamed import Stream, StreamedModel
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.costs.rounded import block_statistics, original_weights
from pennyweight.pipeline.kept import KeptStates, kept_states
from pennyweight.pipeline.losses import distance, kl

# Given a site, its original weight [out, in], its statistics and the number of a variant: its weight in that.
Changed = Callable[[Site, Tensor, SiteStatistics, int], Tensor]


@dataclass(frozen=True)
class Original:
    """The original model on its batches: what each block is given, on disk, and what the last one gives."""

    model: StreamedModel
    stream: Stream
    kept: KeptStates
    last: list[Tensor]

    def losses(self, sites: Sequence[Site], variants: int, changed: Changed) -> list[float]:
        """The mean loss over the tokens of each of `variants` models in which `sites` alone are `changed`; float32."""
        first = min(site.block for site in sites)
        self.kept.take(first, self.stream)
        streams = [
            Stream(self.stream.input_ids, list(self.stream.hidden), self.stream.arguments) for _ in range(variants)
        ]
        for index in range(first, len(self.model.blocks)):
            here = {site.name: site for site in sites if site.block == index}
            with self.model.opened(index) as block:
                self._through(block, index, streams, here, changed)
        return self._compared(streams)

    def _through(
        self, block: nn.Module, index: int, streams: Sequence[Stream], sites: Mapping[str, Site], changed: Changed
    ) -> None:
        """Bring each variant through the opened block, in which `sites` are changed."""
        weights = original_weights(self.model, sites)
        found: dict[str, SiteStatistics] = {}
        if sites:
            self.kept.take(index, self.stream)
            found = block_statistics(self.model, block, index, self.stream, hands_on=False)
        for variant, stream in enumerate(streams):
            for name, site in sites.items():
                self.model.matrix(site).copy_(changed(site, weights[name], found[name], variant))
            self.model.advance(block, index, stream)

    def _compared(self, streams: Sequence[Stream]) -> list[float]:
        """How far what each of `streams` gives is from what the original gives."""
        count = len(self.last)
        hidden = [*self.last, *(part for stream in streams for part in stream.hidden)]
        ids = self.stream.input_ids
        together = Stream([*ids] * (len(streams) + 1), hidden, self.stream.arguments)
        with self.model.finishing(together) as finish:

            def one(batch: int) -> list[float]:
                reference = finish(batch)
                return [self._loss(reference, finish(batch + (n + 1) * count)) for n in range(len(streams))]

            sums = parallel_map(one, range(count))
        tokens = sum(part.numel() for part in ids)
        # Rounding may take a divergence of almost nothing below it.
        return [max(0.0, math.fsum(losses) / tokens) for losses in zip(*sums, strict=True)]

    def _loss(self, reference: Tensor, output: Tensor) -> float:
        """The sum over the tokens of one batch, [windows, tokens, vocabulary or width] each."""
        if self.model.is_decoder:
            return kl(reference.flatten(0, 1), output.flatten(0, 1))
        return math.fsum(float(distance(h, t)) for h, t in zip(output, reference, strict=True))


@contextmanager
def original(model: StreamedModel, batches: Sequence[Tensor], scratch: Path) -> Iterator[Original]:
    """Run `model` on `batches`; hidden states are kept in float32 in the directory `scratch`, which goes away."""
    stream = model.start(batches)
    with kept_states(model, stream, scratch, torch.float32) as kept:
        for index in range(len(model.blocks)):
            kept.put(index, stream)
            with model.opened(index) as block:
                model.advance(block, index, stream)
        yield Original(model, stream, kept, list(stream.hidden))
