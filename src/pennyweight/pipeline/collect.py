"""Calibration statistics of a block's sites."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from pennyweight.core.parallel import parallel_map
from pennyweight.models.base import Site
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.gradients import Sensitivities
from pennyweight.pipeline.observe import Inputs, Observer, rounds
from pennyweight.solvers.base import Statistics
from pennyweight.stats.cross_moment import CrossMoment
from pennyweight.stats.magnitude import Magnitude
from pennyweight.stats.second_moment import SecondMoment

# Of a site that is called with other rows than in the original model, or that the loss does not depend on.
_UNWEIGHTED = "its inputs are not weighted by the loss's gradient"
# Of an expert, whose rows are other tokens in the original model.
_ROUTED = "its inputs in the original model are other tokens': taken to be those that there are"


@dataclass
class Streams:
    """Calibration data on its way through the blocks.

    quantized   behind blocks with the weights that were written
    original    behind the original blocks; None where nobody asks for it
    sensitive   how much the loss depends on each token at each site; None: all tokens weigh the same
    """

    quantized: Stream
    original: Stream | None = None
    sensitive: Sensitivities | None = None

    @staticmethod
    def of(stream: Stream, *, has_original: bool, sensitive: Sensitivities | None = None) -> Streams:
        """Both begin with the same hidden states."""
        return Streams(stream, stream.branched() if has_original else None, sensitive)

    @property
    def are_equal(self) -> bool:
        """Nothing before was quantized."""
        return self.original is not None and all(
            one is other for one, other in zip(self.original.hidden, self.quantized.hidden, strict=True)
        )


@dataclass(frozen=True)
class SiteStatistics:
    """A site's statistics, the rows they were made of, what had to be done about too few, and the size of its inputs
    where that was asked for."""

    stats: Statistics
    rows: int
    notes: tuple[str, ...] = ()
    magnitude: Magnitude | None = None


@dataclass
class _Moments:
    """Sums by leader; crosses of those sites only whose rows are the same tokens in both streams; leaders whose tokens
    all weigh the same though they were asked to differ."""

    leaders: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, SecondMoment] = field(default_factory=dict)
    crosses: dict[str, CrossMoment] = field(default_factory=dict)
    magnitudes: dict[str, Magnitude] = field(default_factory=dict)
    unweighted: set[str] = field(default_factory=set)


def collect(
    model: StreamedModel,
    block: nn.Module,
    sites: Sequence[Site],
    streams: Streams,
    *,
    reference: nn.Module | None = None,
    hands_on: bool = True,
    has_magnitudes: bool = False,
) -> dict[str, SiteStatistics]:
    """Statistics of `sites` of their opened block.

    Sites called with the same input (same memory, shape and strides) share one Hessian: the mean of x xᵀ, or of w x xᵀ
    with the weights that `streams` has for its tokens. Batches run in parallel; sums are made in the order of the
    batches. The original stream, where there is one, goes through `reference`, a copy of the block with its original
    weights (None: the block has them still), and with `hands_on` to the next block.
    """
    index = sites[0].block
    experts = {site.name for site in sites if site.kind == "expert"}
    original, are_equal = streams.original, streams.are_equal and reference is None
    hands_on = hands_on and original is not None
    observer = Observer(model, block, index, sites, needs_outputs=hands_on and are_equal)
    other = Observer(model, reference or block, index, sites, needs_outputs=hands_on)
    moments = _Moments()
    handed_on: list[Tensor] = []
    for batches in rounds(streams.quantized):
        found, outputs = observer.run(streams.quantized, batches)
        theirs: list[Inputs] = []
        if original is not None and not are_equal:
            theirs, outputs = other.run(original, batches)
        handed_on.extend(outputs if hands_on else [])
        weights = _Weights(streams.sensitive, batches)
        _accumulate_(moments, found, theirs, experts, weights, has_magnitudes=has_magnitudes)
    if original is not None and hands_on:
        original.hidden = handed_on
    statistics = _statistics(sites, moments)
    if original is not None:
        statistics = _with_cross(statistics, note=None if are_equal else _ROUTED)
    return {name: _completed(one, moments, moments.leaders.get(name, "")) for name, one in statistics.items()}


def collect_given(site: Site, streams: Streams) -> SiteStatistics:
    """Statistics of a `site` that is given the hidden states of the streams as they are."""
    moments = _Moments(leaders={site.name: site.name})
    for batches in rounds(streams.quantized):
        found = [_given(site, streams.quantized.hidden[batch]) for batch in batches]
        theirs = [] if streams.original is None else [_given(site, streams.original.hidden[batch]) for batch in batches]
        weights = _Weights(streams.sensitive, batches)
        _accumulate_(moments, found, theirs, set(), weights, has_magnitudes=False)
    return _completed(_statistics([site], moments)[site.name], moments, site.name)


def _given(site: Site, x: Tensor) -> Inputs:
    return Inputs(copied=False, leaders={site.name: site.name}, inputs={site.name: [(x, x._version)]})


def _completed(one: SiteStatistics, moments: _Moments, leader: str) -> SiteStatistics:
    notes = (*one.notes, _UNWEIGHTED) if leader in moments.unweighted else one.notes
    return replace(one, notes=notes, magnitude=moments.magnitudes.get(leader))


@dataclass(frozen=True)
class _Weights:
    """What the tokens of `batches` weigh."""

    sensitive: Sensitivities | None
    batches: Sequence[int]

    def roots(self, names: Sequence[str], parts: Sequence[Tensor]) -> list[Tensor] | None:
        """sqrt(w) [tokens, 1] for each of `parts`, the inputs that `names` share; None where nothing is known."""
        weights = None if self.sensitive is None else self.sensitive.weights(names)
        if weights is None:
            return None
        roots = [weights[batch].sqrt().unsqueeze(1) for batch in self.batches]
        return roots if [len(root) for root in roots] == [len(part) for part in parts] else None


def _accumulate_(
    moments: _Moments,
    found: Sequence[Inputs],
    theirs: Sequence[Inputs],
    experts: set[str],
    weights: _Weights,
    *,
    has_magnitudes: bool,
) -> None:
    for batch in found:
        moments.leaders.update({name: leader for name, leader in batch.leaders.items() if name not in moments.leaders})
    for leader in sorted(set(moments.leaders.values())):
        parts = [x for batch in found for x in batch.take(leader)]
        if not parts:
            continue
        roots = None
        if leader in experts:
            # Where all experts run on all tokens, those that were not routed to this one are zeros.
            parts = [x[x.any(dim=1)] for x in parts]
        else:
            roots = weights.roots([name for name, other in moments.leaders.items() if other == leader], parts)
        if has_magnitudes:
            for x in parts:
                moments.magnitudes[leader] = moments.magnitudes.get(
                    leader, Magnitude.zero(x.shape[1], x.device)
                ).update(x)
        if roots is None and weights.sensitive is not None:
            moments.unweighted.add(leader)
        parts = _times(parts, roots)
        if leader not in experts:
            _add_cross_(moments, leader, _times([x for batch in theirs for x in batch.take(leader)], roots), parts)
        if leader not in moments.seconds:
            moments.seconds[leader] = SecondMoment.zero(parts[0].shape[1], parts[0].device)
        moments.seconds[leader] = moments.seconds[leader].update_(parts)


def _times(parts: list[Tensor], roots: Sequence[Tensor] | None) -> list[Tensor]:
    if roots is None or not parts:
        return parts
    return parallel_map(lambda pair: pair[0] * pair[1], list(zip(parts, roots, strict=True)))


def _add_cross_(moments: _Moments, leader: str, original: list[Tensor], parts: list[Tensor]) -> None:
    if not original:
        return
    if leader not in moments.crosses:
        moments.crosses[leader] = CrossMoment.zero(parts[0].shape[1], parts[0].device)
    moments.crosses[leader] = moments.crosses[leader].update_(original, parts)


def _statistics(sites: Sequence[Site], sums: _Moments) -> dict[str, SiteStatistics]:
    shared: dict[str, Statistics] = {}
    leaders, moments = sums.leaders, sums.seconds
    pooled = _pooled(sites, leaders, moments)
    found: dict[str, SiteStatistics] = {}
    for site in sites:
        leader = leaders.get(site.name)
        moment = moments.get(leader) if leader is not None else None
        if site.kind == "expert":
            key = f"expert {leader or pool_of(site)}"
            found[site.name] = _expert(site, moment, pooled.get(pool_of(site)), shared, key)
        elif moment is None or leader is None or not moment.rows:
            found[site.name] = SiteStatistics(Statistics(), 0, ("saw no calibration data: rounded to nearest",))
        else:
            if leader not in shared:
                cross = sums.crosses.get(leader)
                shared[leader] = Statistics(moment.hessian_(), None if cross is None else cross.mean_())
            found[site.name] = SiteStatistics(shared[leader], moment.rows)
    return found


def _with_cross(statistics: Mapping[str, SiteStatistics], *, note: str | None) -> dict[str, SiteStatistics]:
    """Where nothing else is known the input of the original model is taken to be the one that there is: G = H."""
    made: dict[int, Statistics] = {}
    found: dict[str, SiteStatistics] = {}
    for name, one in statistics.items():
        if one.stats.hessian is None or one.stats.cross is not None:
            found[name] = one
            continue
        stats = made.setdefault(id(one.stats), Statistics(one.stats.hessian, one.stats.hessian))
        found[name] = replace(one, stats=stats, notes=one.notes if note is None else (*one.notes, note))
    return found


def pool_of(site: Site) -> str:
    """The same for all experts of a layer's projection: their names without the expert's number."""
    return re.sub(r"experts\.\d+", "experts.*", site.name) if site.index is None else site.tensor


def _pooled(
    sites: Sequence[Site], leaders: Mapping[str, str], moments: Mapping[str, SecondMoment]
) -> dict[str, Tensor]:
    pools: dict[str, SecondMoment] = {}
    counted: set[str] = set()
    for site in sites:
        leader = leaders.get(site.name)
        if site.kind != "expert" or leader is None or leader not in moments or f"{pool_of(site)} {leader}" in counted:
            continue
        counted.add(f"{pool_of(site)} {leader}")
        moment = moments[leader]
        pool = pools.setdefault(pool_of(site), SecondMoment.zero(site.shape[1], moment.total.device))
        pools[pool_of(site)] = pool.merge_(moment)
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
