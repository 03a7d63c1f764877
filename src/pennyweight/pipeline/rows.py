"""Sites that are solved a few rows at a time, as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from types import MappingProxyType

import torch
from torch import Tensor

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.models.base import Checkpoint, Site, StoredModel
from pennyweight.pipeline.chain import Chain
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.output import Output
from pennyweight.pipeline.records import SiteRecord
from pennyweight.pipeline.solve import SolvedSite, check_finite, joined, solve_site
from pennyweight.schemes import Scheme
from pennyweight.solvers.base import Statistics

# Weights that one thread reads and solves at a time where there is no data: its buffers are small enough that the
# allocator reuses them, which a buffer of a whole matrix is not.
_PART = 1 << 22
# Weights that are solved at a time with data, by all threads: of the size of a large matrix of a block.
_LARGE_PART = 1 << 26
_NOTHING = SiteStatistics(Statistics(), 0)


def solve_without_data(
    model: StoredModel,
    output: Output,
    sites: Sequence[Site],
    chain: Chain,
    known: Mapping[str, SiteStatistics] = MappingProxyType({}),
) -> list[SiteRecord]:
    """Sites solved without data, or on what is `known` of them: a few rows at a time are read and solved, each part by
    one thread. The one that comes last writes the site, while others go on: of many experts few are in memory."""
    schemes = output.plan.schemes
    parts = {site.name: _row_parts(site, schemes[site.name], _PART) for site in sites}
    solved: dict[str, dict[int, SolvedSite]] = {site.name: {} for site in sites}
    lock = Lock()

    def solve(work: tuple[Site, int]) -> SiteRecord | None:
        site, number = work
        matrix = stored_matrix(model.checkpoint, site, parts[site.name][number]).to(model.device).contiguous()
        check_finite(matrix, site.tensor)
        part = solve_site(site, matrix, schemes[site.name], chain, known.get(site.name, _NOTHING))
        with lock:
            solved[site.name][number] = part
            if len(solved[site.name]) < len(parts[site.name]):
                return None
            done = solved.pop(site.name)
        whole = joined([done[number] for number in range(len(done))])
        output.write(site, whole.weight)
        return whole.record

    # The largest first: near the end there is little for one thread alone.
    by_size = sorted(sites, key=lambda site: -site.weights)
    work = [(site, number) for site in by_size for number in range(len(parts[site.name]))]
    records = {record.name: record for record in parallel_map(solve, work) if record is not None}
    return [records[site.name] for site in sites]


def solve_by_rows(model: StoredModel, output: Output, site: Site, chain: Chain, found: SiteStatistics) -> SiteRecord:
    """A site too large to be in memory whole: its rows are read and solved part after part, and then written."""
    scheme = output.plan.schemes[site.name]

    def solve(rows: slice) -> SolvedSite:
        matrix = stored_matrix(model.checkpoint, site, rows).to(model.device, torch.float32).contiguous()
        check_finite(matrix, site.tensor)
        return solve_site(site, matrix, scheme, chain, found)

    whole = joined([solve(rows) for rows in _row_parts(site, scheme, _LARGE_PART)])
    output.write(site, whole.weight)
    return whole.record


def _row_parts(site: Site, scheme: Scheme, weights: int) -> list[slice]:
    """Rows with about that many weights that can be solved by themselves: all at once where they share what is stored,
    or do not lie together."""
    if scheme.rows_share or site.transposed or 0 in site.shape:
        return [slice(0, site.shape[0])]
    return chunks(site.shape[0], max(1, weights // site.shape[1]))


def stored_matrix(checkpoint: Checkpoint, site: Site, rows: slice | None = None) -> Tensor:
    """The matrix [out, in] of `site`, or some `rows` of it, in its stored type; no more than that is read."""
    if site.index is None and not site.transposed:
        matrix = checkpoint.read(site.tensor, rows)
        rows = None
    elif site.index is None:
        matrix = checkpoint.read(site.tensor)
    else:
        matrix = checkpoint.read(site.tensor, slice(site.index, site.index + 1))[0]
    matrix = matrix.T if site.transposed else matrix
    return matrix if rows is None else matrix[rows]
