"""The moments of what a site reads, from the values of a walk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network.network import NetworkSite
from pennyweight.pipeline.network.moments import Collector, Moments
from pennyweight.pipeline.network.recurrent import recurrent_rows
from pennyweight.pipeline.network.rows import Reader
from pennyweight.pipeline.network.walk import Walk

# Rows of a site's inputs that are looked at: so many, or so many times its inputs where that is more.
ROWS, ROWS_PER_INPUT = 16_384, 8
# Apart from each other for any number of batches that there may be.
_SEEDS = 1_000_003


@dataclass(frozen=True)
class Wanted:
    """What is collected: also the cross moment with the float network; of rows drawn by `seed`."""

    has_cross: bool = False
    seed: int = 0


def moments_of(site: NetworkSite, name: str, rounded: Walk, original: Walk, wanted: Wanted) -> Moments | None:
    """Of the rows that `site` multiplies in the node `name`, whose arguments both walks have. None where it reads none,
    or not such that they can be had."""
    groups = site.groups
    collector = Collector(groups, site.matrix_shape[1], has_cross=wanted.has_cross)
    if not add_rows(collector, site, name, rounded, original, wanted):
        return None
    return collector.finished()


def add_rows(collector: Collector, site: NetworkSite, name: str, rounded: Walk, original: Walk, wanted: Wanted) -> bool:
    """Add what `site` multiplies in the node `name`; False where that is nothing."""
    found = False
    rows = _rows(site, name, rounded, wanted.seed)
    others = _rows(site, name, original, wanted.seed) if wanted.has_cross and original is not rounded else None
    for x in rows:
        collector.add(x, x if others is None else next(others))
        found = True
    return found


def _rows(site: NetworkSite, name: str, walk: Walk, seed: int) -> Iterator[Tensor]:
    """[groups, rows, in] of each batch, float32."""
    node = walk.nodes[name]
    if node.op != "call_module":
        yield from _recurrent(site, node, walk, seed)
        return
    module = walk.network.graph.get_submodule(str(node.target))
    if isinstance(module, nn.Embedding):
        return
    inputs = [args[0] for args, _ in walk.inputs(name)]
    reader = Reader(module)
    reader = replace(reader, share=_share(site, sum(reader.count(x) for x in inputs)))
    for batch, x in enumerate(inputs):
        yield reader.rows(x, reader.draw(x, _generator(walk, name, batch, seed))).float()


def _recurrent(site: NetworkSite, node: fx.Node, walk: Walk, seed: int) -> Iterator[Tensor]:
    for batch in range(walk.batches):
        rows = recurrent_rows(node, partial(walk.value, batch=batch)).get(site.parameter)
        if rows is None:
            return
        share = _share(site, rows.shape[0] * walk.batches)
        count = max(1, int(share * rows.shape[0]))
        if count < rows.shape[0]:
            rows = rows[torch.randint(rows.shape[0], (count,), generator=_generator(walk, node.name, batch, seed))]
        yield rows[None].float()


def _share(site: NetworkSite, rows: int) -> float:
    return min(1.0, max(ROWS, ROWS_PER_INPUT * site.matrix_shape[1]) / max(1, rows))


def _generator(walk: Walk, name: str, batch: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * _SEEDS + walk.place(name)) * _SEEDS + batch)
