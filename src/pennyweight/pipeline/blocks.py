"""Block after block: calibrate on what the quantized blocks before it give, solve, write, hand on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pennyweight.core.memory import give_back_memory
from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.models.base import Checkpoint, Site
from pennyweight.models.streamed import Stream, StreamedModel
from pennyweight.pipeline.chain import Chain
from pennyweight.pipeline.collect import SiteStatistics, Streams, collect
from pennyweight.pipeline.journal import Journal
from pennyweight.pipeline.output import Output
from pennyweight.pipeline.records import BlockDone, SiteRecord, Tell
from pennyweight.pipeline.rescale import BlockRescaler, kept_names
from pennyweight.pipeline.solve import SolvedSite, again_measured, check_finite, joined, solve_site
from pennyweight.schemes import QuantizedWeight, Scheme
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.learned.base import BlockProblem

# Weights that one thread reads and solves at a time where there is no data: its buffers are small enough that the
# allocator reuses them, which a buffer of a whole matrix is not.
_PART = 1 << 22
# Rows that one thread puts back at a time.
_ROWS = 256
# Weights whose codes, a byte each, are held before they are written.
_ROUND = 1 << 27


def run_blocks(
    model: StreamedModel,
    output: Output,
    journal: Journal,
    *,
    chain: Chain,
    streams: Streams | None,
    tell: Tell,
) -> list[SiteRecord]:
    """Solve and write every block that the journal does not have; returns the records of all, in order.

    With `streams` each block is calibrated on the outputs of the blocks before it as they were written; finished
    blocks of an earlier run are read back and only run. Without them no block is run at all.
    """
    records: list[SiteRecord] = []
    is_rescaled = chain.transform is not None and streams is not None
    rescaler = BlockRescaler(model, chain.transform, output.plan.schemes) if is_rescaled else None  # type: ignore[arg-type]
    for index in range(len(model.blocks)):
        part = f"block {index}"
        is_done = part in journal.finished
        if not is_done:
            found, folds = _one_block(model, output, index, chain=chain, streams=streams, rescaler=rescaler)
            output.files.flush()
            journal.add(part, found, found={"rescaled": folds} if folds else {})
        elif streams is not None:
            _replay(model, output, index, streams)
        records.extend(journal.finished[part])
        tell(BlockDone(index, len(model.blocks), journal.finished[part], resumed=is_done))
    return records


def _one_block(
    model: StreamedModel,
    output: Output,
    index: int,
    *,
    chain: Chain,
    streams: Streams | None,
    rescaler: BlockRescaler | None,
) -> tuple[list[SiteRecord], tuple[str, ...]]:
    """The records of the sites of block `index`, and which of its folds were rescaled."""
    sites = [site for site in model.sites_of(index) if site.name in output.plan.schemes]
    if streams is None:
        return _without_data(model, output, sites, chain), ()
    folds: tuple[str, ...] = ()
    with model.opened(index) as block:
        # Before the block is run: what comes out of NaN would be blamed on other sites.
        parallel_map(lambda site: check_finite(model.matrix(site), site.tensor), sites)
        found = collect(model, block, index, streams, has_magnitudes=rescaler is not None)
        give_back_memory()
        if rescaler is not None:
            rewritten = rescaler.rewrite_(block, index, sites, found)
            found, folds = rewritten.statistics, rewritten.folds
            for name, tensor in rewritten.kept.items():
                output.files.write(name, tensor)
        solve = _each_site if chain.refine is None else _together
        records = solve(model, output, index, sites, found, chain=chain, streams=streams)
        give_back_memory()
        _advance(model, block, index, streams.quantized)
    return records, folds


def _each_site(
    model: StreamedModel,
    output: Output,
    index: int,
    sites: Sequence[Site],
    found: dict[str, SiteStatistics],
    *,
    chain: Chain,
    streams: Streams,
) -> list[SiteRecord]:
    """Solve, write and put back one site after the other."""
    records = []
    for site in sites:
        matrix = model.matrix(site).contiguous()
        # The last site of an input lets go of its Hessian.
        solved = solve_site(site, matrix, output.plan.schemes[site.name], chain, found.pop(site.name))
        output.write(site, solved.weight)
        _put_back(model, site, solved.weight)
        records.append(solved.record)
    return records


def _together(
    model: StreamedModel,
    output: Output,
    index: int,
    sites: Sequence[Site],
    found: dict[str, SiteStatistics],
    *,
    chain: Chain,
    streams: Streams,
) -> list[SiteRecord]:
    """Solve all sites, then refine them as one block; nothing is written before that."""
    assert chain.refine is not None
    assert streams.original is not None
    originals = {site.name: model.matrix(site).contiguous().clone() for site in sites}
    solved = {
        site.name: solve_site(site, originals[site.name], output.plan.schemes[site.name], chain, found[site.name])
        for site in sites
    }
    block = model.module.get_submodule(model.blocks[index])
    problem = BlockProblem(
        weights=originals,
        start={name: one.weight for name, one in solved.items()},
        forward=lambda weights, batch: model.run_with(block, index, streams.quantized, batch, weights),
        targets=streams.original.hidden,
        seed=chain.seed,
    )
    refined = chain.refine.refine(problem)
    records = []
    for site in sites:
        weight = refined.weights[site.name]
        output.write(site, weight)
        _put_back(model, site, weight)
        records.append(
            again_measured(site, originals[site.name], weight, found.pop(site.name), solved[site.name].record)
        )
    return records


def _without_data(model: StreamedModel, output: Output, sites: Sequence[Site], chain: Chain) -> list[SiteRecord]:
    """Sites solved without data: a few rows at a time are read and solved, each part by one thread."""
    records: list[SiteRecord] = []
    for together in _rounds(sites):
        records.extend(_one_round(model, output, together, chain))
    return records


def _rounds(sites: Sequence[Site]) -> list[list[Site]]:
    """Consecutive sites whose codes are held at once: a block of many experts is larger than memory should be."""
    rounds: list[list[Site]] = [[]]
    for site in sites:
        if rounds[-1] and sum(other.weights for other in rounds[-1]) + site.weights > _ROUND:
            rounds.append([])
        rounds[-1].append(site)
    return rounds


def _one_round(model: StreamedModel, output: Output, sites: Sequence[Site], chain: Chain) -> list[SiteRecord]:
    parts = [(site, part) for site in sites for part in _row_parts(site, output.plan.schemes[site.name])]

    def solve(work: tuple[Site, slice]) -> SolvedSite:
        site, part = work
        matrix = stored_matrix(model.checkpoint, site, part).to(model.device).contiguous()
        check_finite(matrix, site.tensor)
        return solve_site(site, matrix, output.plan.schemes[site.name], chain, SiteStatistics(Statistics(), 0))

    solved: dict[str, list[SolvedSite]] = {site.name: [] for site in sites}
    for (site, _), result in zip(parts, parallel_map(solve, parts), strict=True):
        solved[site.name].append(result)

    def write(site: Site) -> SiteRecord:
        whole = joined(solved.pop(site.name))
        output.write(site, whole.weight)
        return whole.record

    return parallel_map(write, sites)


def _row_parts(site: Site, scheme: Scheme) -> list[slice]:
    """Rows that can be solved by themselves: all at once where they share what is stored, or do not lie together."""
    if scheme.rows_share or site.transposed or 0 in site.shape:
        return [slice(0, site.shape[0])]
    return chunks(site.shape[0], max(1, _PART // site.shape[1]))


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


def _put_back(model: StreamedModel, site: Site, weight: QuantizedWeight) -> None:
    """The block computes with the decoded weights from now on."""
    matrix = model.matrix(site)
    parallel_map(lambda rows: matrix[rows].copy_(weight.rows(rows).dequantize()), chunks(matrix.shape[0], _ROWS))


def _replay(model: StreamedModel, output: Output, index: int, streams: Streams) -> None:
    """Run a block that an earlier run finished, with the weights that it wrote."""
    with model.opened(index) as block:
        if streams.original is not None:
            _advance(model, block, index, streams.original)
        quantized = [site for site in model.sites_of(index) if site.name in output.plan.schemes]
        for site in quantized:
            _put_back(model, site, output.read(site))
        # A transform changes norms and biases too.
        for parameter, name in kept_names(model, index, [site.name for site in quantized]).items():
            model.module.get_parameter(parameter).data.copy_(output.files.read(name))
        _advance(model, block, index, streams.quantized)


def _advance(model: StreamedModel, block: nn.Module, index: int, stream: Stream) -> None:
    if index + 1 < len(model.blocks):
        model.advance(block, index, stream, watched=model.watched(model.sites_of(index)))
