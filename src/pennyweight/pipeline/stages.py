"""The order in which the sites of a block come to depend on each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pennyweight.models.base import Site
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.collect import pool_of
from pennyweight.pipeline.observe import Observer


def stages_of(model: StreamedModel, block: nn.Module, sites: Sequence[Site], stream: Stream) -> list[list[Site]]:
    """`sites` of an opened block in the order of their first calls, those with the same input together.

    Seen by running the first batch. All experts of a layer are taken as one: what their first projections see does not
    depend on each other. An expert that was not called comes with the others of its projection; any other site that was
    not, at last.
    """
    by_name = {site.name: site for site in sites}
    [found], _ = Observer(model, block, sites[0].block, sites, needs_outputs=False).run(stream, [0])
    key_of = {name: _key(by_name[leader]) for name, leader in found.leaders.items()}
    key_of_pool = {pool_of(by_name[name]): key for name, key in key_of.items()}
    stages: dict[str, list[Site]] = {key: [] for key in key_of.values()}
    for site in sites:
        key = key_of.get(site.name) or key_of_pool.get(pool_of(site)) or next(reversed(stages), "")
        stages.setdefault(key, []).append(site)
    return list(stages.values())


def _key(leader: Site) -> str:
    return pool_of(leader) if leader.kind == "expert" else leader.name
