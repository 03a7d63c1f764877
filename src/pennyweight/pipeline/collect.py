"""Running calibration data through a block and accumulating what its sites saw."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from pennyweight.models.base import Site
from pennyweight.models.intercept import Seen, Watched
from pennyweight.models.streamed import Stream, StreamedModel
from pennyweight.solvers.base import Statistics
from pennyweight.stats.second_moment import SecondMoment

# Tokens whose activations are held at once: a constant, so that sums are cut alike on every machine.
_ROUND_TOKENS = 2048


@dataclass(frozen=True)
class SiteStatistics:
    """A site's statistics, the rows they were made of, and what had to be done about too few."""

    stats: Statistics
    rows: int
    notes: tuple[str, ...] = ()


@dataclass
class _Inputs:
    """What one batch showed.

    leaders  site -> the site whose input it shares, itself if it was called first
    inputs   leader -> its inputs [..., in], and the versions that these tensors had when it was called
    copied   whether `inputs` are copies, for a block that changes its tensors in place
    held     what was copied: no other input can take its memory, and so its key, while the batch runs
    """

    copied: bool
    leaders: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, list[tuple[Tensor, int]]] = field(default_factory=dict)
    held: list[Tensor] = field(default_factory=list)

    @property
    def is_overwritten(self) -> bool:
        return any(x._version != version for seen in self.inputs.values() for x, version in seen)


def collect(model: StreamedModel, block: nn.Module, index: int, stream: Stream) -> dict[str, SiteStatistics]:
    """Statistics of every site of the opened block `index` on the windows of `stream`.

    Sites called with the same input (same memory, shape and strides) share one Hessian. Batches run in parallel;
    sums are made in the order of the batches.
    """
    sites = model.sites_of(index)
    watched = model.watched(sites)
    experts = {site.name for site in sites if site.kind == "expert"}
    leaders: dict[str, str] = {}
    moments: dict[str, SecondMoment] = {}
    copied = False
    for batches in _rounds(stream):
        found = _run(model, block, index, stream, watched=watched, batches=batches, copied=copied)
        if any(batch.is_overwritten for batch in found):
            copied = True
            found = _run(model, block, index, stream, watched=watched, batches=batches, copied=True)
        for batch in found:
            leaders.update({name: leader for name, leader in batch.leaders.items() if name not in leaders})
        _accumulate(moments, leaders, found, experts)
    return _statistics(sites, leaders, moments)


def _run(
    model: StreamedModel,
    block: nn.Module,
    index: int,
    stream: Stream,
    *,
    watched: Watched,
    batches: Sequence[int],
    copied: bool,
) -> list[_Inputs]:
    found = {batch: _Inputs(copied) for batch in batches}
    model.run_block(block, index, stream, seen=lambda batch: _observer(found[batch]), watched=watched, batches=batches)
    return [found[batch] for batch in batches]


def _rounds(stream: Stream) -> list[list[int]]:
    rounds: list[list[int]] = [[]]
    tokens = 0
    for batch, ids in enumerate(stream.input_ids):
        if tokens and tokens + ids.numel() > _ROUND_TOKENS:
            rounds.append([])
            tokens = 0
        rounds[-1].append(batch)
        tokens += ids.numel()
    return rounds


def _observer(found: _Inputs) -> Seen:
    leader_of: dict[tuple[object, ...], str] = {}

    def seen(names: list[str], x: Tensor) -> None:
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x._version)
        leader = leader_of.setdefault(key, names[0])
        if leader == names[0]:
            if found.copied:
                found.held.append(x)
            kept = x.clone() if found.copied else x
            found.inputs.setdefault(leader, []).append((kept, kept._version))
        for name in names:
            found.leaders.setdefault(name, leader)

    return seen


def _accumulate(
    moments: dict[str, SecondMoment], leaders: Mapping[str, str], found: Sequence[_Inputs], experts: set[str]
) -> None:
    for leader in sorted(set(leaders.values())):
        inputs = [x for batch in found for x, _ in batch.inputs.pop(leader, [])]
        if not inputs:
            continue
        parts = [x.reshape(-1, x.shape[-1]) for x in inputs]
        inputs.clear()
        if leader in experts:
            # Where all experts run on all tokens, those that were not routed to this one are zeros.
            parts = [x[x.any(dim=1)] for x in parts]
        if leader not in moments:
            moments[leader] = SecondMoment.zero(parts[0].shape[1], parts[0].device)
        moments[leader] = moments[leader].update_(parts)


def _statistics(
    sites: Sequence[Site], leaders: Mapping[str, str], moments: dict[str, SecondMoment]
) -> dict[str, SiteStatistics]:
    shared: dict[str, Statistics] = {}
    pooled = _pooled(sites, leaders, moments)
    found: dict[str, SiteStatistics] = {}
    for site in sites:
        leader = leaders.get(site.name)
        moment = moments.get(leader) if leader is not None else None
        if site.kind == "expert":
            key = f"expert {leader or _pool(site)}"
            found[site.name] = _expert(site, moment, pooled.get(_pool(site)), shared, key)
        elif moment is None or leader is None or not moment.rows:
            found[site.name] = SiteStatistics(Statistics(), 0, ("saw no calibration data: rounded to nearest",))
        else:
            if leader not in shared:
                shared[leader] = Statistics(moment.hessian_())
            found[site.name] = SiteStatistics(shared[leader], moment.rows)
    return found


def _pool(site: Site) -> str:
    """The same for all experts of a layer's projection: their names without the expert's number."""
    return re.sub(r"experts\.\d+", "experts.*", site.name) if site.index is None else site.tensor


def _pooled(
    sites: Sequence[Site], leaders: Mapping[str, str], moments: Mapping[str, SecondMoment]
) -> dict[str, Tensor]:
    pools: dict[str, SecondMoment] = {}
    counted: set[str] = set()
    for site in sites:
        leader = leaders.get(site.name)
        if site.kind != "expert" or leader is None or leader not in moments or f"{_pool(site)} {leader}" in counted:
            continue
        counted.add(f"{_pool(site)} {leader}")
        moment = moments[leader]
        pool = pools.setdefault(_pool(site), SecondMoment.zero(site.shape[1], moment.total.device))
        pools[_pool(site)] = pool.merge_(moment)
    return {name: pool.hessian_() for name, pool in pools.items()}


def _expert(
    site: Site, own: SecondMoment | None, pool: Tensor | None, shared: dict[str, Statistics], key: str
) -> SiteStatistics:
    """An expert's own Hessian when it saw at least as many rows as it has inputs; with fewer, r of n, the mean

    (r/n) H_own + (1 - r/n) H_pool

    with the Hessian pooled over the layer's experts; without any data in the layer, none.
    """
    rows = own.rows if own is not None else 0
    own = own if rows else None
    inputs = site.shape[1]
    if pool is None:
        return SiteStatistics(Statistics(), 0, ("no expert of the layer saw calibration data: rounded to nearest",))
    if own is not None and rows >= inputs:
        if key not in shared:
            shared[key] = Statistics(own.hessian_())
        return SiteStatistics(shared[key], rows)
    if key not in shared:
        share = rows / inputs
        shared[key] = Statistics(pool if own is None else own.hessian_().mul_(share).add_(pool, alpha=1 - share))
    note = f"saw {rows} of the {inputs} rows that a Hessian needs: blended with the layer's pooled one"
    if own is None:
        note = "saw no rows: the layer's pooled Hessian is used"
    return SiteStatistics(shared[key], rows, (note,))
