"""The weights that a solver makes of a site of the original model, on which every cost agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from pennyweight.models.base import Site
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.chain import Chain
from pennyweight.pipeline.collect import SiteStatistics, Streams, collect, collect_given
from pennyweight.pipeline.solve import SolvedSite, check_finite, solve_site
from pennyweight.schemes import Scheme
from pennyweight.solvers.base import Solver


def statistics(
    model: StreamedModel, block: nn.Module, index: int, stream: Stream, *, hands_on: bool
) -> dict[str, SiteStatistics]:
    """Statistics of all sites of the opened block `index`, or of the head behind the last, on the original model's own
    inputs: those of an expert may be blended with the others'. With `hands_on` the stream goes to the next block."""
    if index == len(model.blocks):
        given = Streams(replace(stream, hidden=list(stream.hidden)))
        model.enter_head(given.quantized)
        return {site.name: collect_given(site, given) for site in model.sites_of(index)}
    streams = Streams.of(stream, has_original=True)
    found = collect(model, block, model.sites_of(index), streams, hands_on=hands_on)
    if hands_on and streams.original is not None:
        stream.hidden = streams.original.hidden
    return found


def original_weights(model: StreamedModel, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """The matrices [out, in] of `sites` of what is opened, in its own memory where that has them row by row; raises
    WeightError for NaN or infinity."""
    weights = {name: model.matrix(site).contiguous() for name, site in sites.items()}
    for name, site in sites.items():
        check_finite(weights[name], site.tensor)
    return weights


def solved(site: Site, w: Tensor, scheme: Scheme, solver: Solver, found: SiteStatistics) -> SolvedSite:
    """What `solver` makes of `w` [out, in], and the error it recorded."""
    return solve_site(site, w, scheme, Chain(solver, "search"), found)


def rounded(site: Site, w: Tensor, scheme: Scheme, solver: Solver, found: SiteStatistics) -> Tensor:
    """Ŵ float32 [out, in]: `w` as it would be read back."""
    return solved(site, w, scheme, solver, found).weight.dequantize()
