"""The second-order divergence, from one pass forwards and one backwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.core.parallel import one_thread_per_operation, parallel_map
from pennyweight.kernels.matmul import matmul_nt
from pennyweight.models.base import Site
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.collect import pool_of
from pennyweight.pipeline.costs.base import Cost, Tell, asked_schemes, named_sites, summed, tell_nobody
from pennyweight.pipeline.costs.compared import compared
from pennyweight.pipeline.costs.pairs import Pair, Pairs
from pennyweight.pipeline.costs.rounded import original_weights, rounded, statistics
from pennyweight.pipeline.gradients import through_block, walk_back
from pennyweight.pipeline.losses import quadratic_kl
from pennyweight.plan.candidates import Candidates
from pennyweight.schemes import Scheme
from pennyweight.solvers.base import Solver


@dataclass(frozen=True)
class FisherCost:
    """c = 1/(2n) (sum over tokens of (dz · E (x - m))² + sum over outputs and windows of (E m)² mean (sum dz)²),

    dz = dl/dz,  z = W x,  E = W - Ŵ,  m the mean of a window's inputs x, the last mean over windows, of the sum over a
    window's tokens; summed over a group's sites. It stands for the second-order KL of the n tokens in nats,

        1/(2n) sum over windows of (sum over tokens of dz · E x)²,

    for l the cross entropy with tokens drawn from the model's own prediction: the Fisher information (Amari, "Natural
    gradient works efficiently in learning", 1998) of W in the direction of the error. That sum is one square a window
    and draw, too few to know its mean. Tokens are therefore taken one by one, but for what is the same in all of a
    window, whose effects add up (in attention's values most of all); outputs of that part are taken one by one in their
    turn, which needs fewer draws. Products of different sites are left out. Of an encoder l is a random projection of
    the last hidden states. One pass forwards and one backwards, and for each scheme one product of the site's inputs
    with its error. An expert's tokens are all taken one by one. How an error makes a router choose other experts has no
    gradient, and is not seen.

    A site whose calls cannot be told, and an expert that saw no token, which counts as if it had seen one, are given
    the mean curvature of the layer's experts, or of the block, in a random direction:

        c = r/(2n) mean(|dz|² |x|²) |E|² / (in · out),    r its rows, at least 1.

    The error of an output head goes straight into the logits: its cost is the second-order KL exactly, without drawing
    tokens,

        c = 1/(2n) sum over tokens of (E_p[d²] - E_p[d]²),    d what E changes in the logits,  p = softmax(logits).
    """

    name: str = "fisher"

    @one_thread_per_operation()
    def measure(
        self,
        model: StreamedModel,
        batches: Sequence[Tensor],
        groups: Sequence[Candidates],
        *,
        solver: Solver,
        seed: int,
        scratch: Path,
        tell: Tell = tell_nobody,
    ) -> list[list[float]]:
        """See Cost."""
        asked, named = asked_schemes(groups), named_sites(model, groups)
        costs: dict[tuple[str, str], float] = {}
        tokens = sum(ids.numel() for ids in batches)

        def visit(index: int, stream: Stream, outer: Sequence[Tensor]) -> list[Tensor]:
            sites = {name: site for name, site in named.items() if site.block == index}
            slopes, calls = _calls(model, index, stream, outer)
            if sites:
                block = model.module.get_submodule(model.blocks[index])
                found = statistics(model, block, index, stream, hands_on=False)
            for name, w in original_weights(model, sites).items():
                for scheme in asked[name].values():
                    e = w - rounded(sites[name], w, scheme, solver, found[name])
                    costs[name, scheme.name] = calls.curvature(sites[name], e) / (2 * tokens)
            tell(len(model.blocks) - index, len(model.blocks))
            return slopes

        def turn(stream: Stream) -> None:
            for site in (site for site in named.values() if site.kind == "head"):
                found = _of_head(model, site, list(asked[site.name].values()), stream, solver)
                costs.update({(site.name, scheme): cost for scheme, cost in found.items()})

        walk_back(model, batches, scratch, seed=seed, visit=visit, turn=turn)
        return summed(groups, costs)


def _of_head(
    model: StreamedModel, head: Site, schemes: Sequence[Scheme], stream: Stream, solver: Solver
) -> dict[str, float]:
    """Name of a scheme -> cost; `stream` holds what the last block gives."""
    costs: dict[str, float] = {}
    with model.opened(head.block) as block:
        [w] = original_weights(model, {head.name: head}).values()
        [found] = statistics(model, block, head.block, stream, hands_on=False).values()
        for scheme in schemes:
            given = {model.places[head.name].parameter: rounded(head, w, scheme, solver, found)}
            [costs[scheme.name]] = compared(model, stream, [stream], given=given, loss=quadratic_kl)
    return costs


def _calls(model: StreamedModel, index: int, stream: Stream, outer: Sequence[Tensor]) -> tuple[list[Tensor], _Calls]:
    """Slopes of what block `index` is given, and the calls of all its sites."""
    sites = {site.name: site for site in model.sites_of(index)}
    pairs = [Pairs(sites, model.places, (ids.shape[0], ids.shape[1])) for ids in stream.input_ids]
    slopes = through_block(
        model, index, stream, outer, list(sites.values()), seen=lambda n: pairs[n].seen, made=lambda n: pairs[n].made
    )
    for one in pairs:
        one.close()
    known = {name: [pair for one in pairs for pair in one.found.get(name, [])] for name in sites}
    rows = {name: sum(one.rows.get(name, 0) for one in pairs) for name in sites}
    told = {name for one in pairs for name in one.found}
    return slopes, _Calls.of(sites, {name: known[name] for name in sites if name in told}, rows)


@dataclass(frozen=True)
class _Calls:
    """The calls of a block's sites.

    pairs    site -> its calls, for those that can be told
    rows     site -> rows that it was called with
    sizes    pool of experts, "" for all sites -> mean of |dz|² |x|² over the rows of their calls
    """

    pairs: Mapping[str, Sequence[Pair]]
    rows: Mapping[str, int]
    sizes: Mapping[str, float]

    @staticmethod
    def of(sites: Mapping[str, Site], pairs: Mapping[str, Sequence[Pair]], rows: Mapping[str, int]) -> _Calls:
        pools: dict[str, list[Pair]] = {"": []}
        for name, parts in pairs.items():
            pools[""].extend(parts)
            if sites[name].kind == "expert":
                pools.setdefault(pool_of(sites[name]), []).extend(parts)
        return _Calls(pairs, rows, {pool: _mean_size(parts) for pool, parts in pools.items()})

    def curvature(self, site: Site, e: Tensor) -> float:
        """The sum over the site's rows of (dz · E x)²."""
        if site.name not in self.pairs:
            size = self.sizes.get(pool_of(site), self.sizes[""])
            return max(1, self.rows[site.name]) * size * float(e.double().square().mean())
        pairs = self.pairs[site.name]
        terms = parallel_map(lambda pair: _terms(pair, e), pairs)
        windows = sum(pair.windows or 0 for pair in pairs)
        means, slopes = (sum((part[n] for part in terms), e.new_zeros(1, dtype=torch.float64)) for n in (1, 2))
        return math.fsum(float(part[0]) for part in terms) + float((means * slopes).sum()) / max(1, windows)


def _terms(pair: Pair, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of (dz · E (x - m))² over the rows, and over windows of (E m)² [out] and (sum dz)² [out]; without windows m
    is 0. Products in float32, summed in float64."""
    z, slopes = matmul_nt(pair.x.float(), e), pair.slopes
    nothing = z.new_zeros(1, dtype=torch.float64)
    if pair.windows is None:
        return (z * slopes).sum(-1).double().square().sum(), nothing, nothing
    z, slopes = (part.view(pair.windows, -1, part.shape[-1]) for part in (z, slopes))
    mean = z.mean(1, keepdim=True)
    squares = ((z - mean) * slopes).sum(-1).double().square().sum()
    return squares, mean.double().square().sum((0, 1)), slopes.sum(1).double().square().sum(0)


def _mean_size(pairs: Sequence[Pair]) -> float:
    """mean of |dz|² |x|² over the rows, 0 where there are none."""
    rows = sum(pair.x.shape[0] for pair in pairs)
    sizes = [(pair.x.double().square().sum(-1) * pair.slopes.double().square().sum(-1)).sum() for pair in pairs]
    return math.fsum(float(size) for size in sizes) / max(rows, 1)


PROVIDES: tuple[Cost, ...] = (FisherCost(),)
