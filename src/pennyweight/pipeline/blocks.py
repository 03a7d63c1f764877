"""Block after block: calibrate on what the quantized blocks before it give, solve, write, hand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pennyweight.core.parallel import chunks, parallel_map
from pennyweight.models.base import Site
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.blind import count_blocks
from pennyweight.pipeline.chain import Chain
from pennyweight.pipeline.collect import SiteStatistics, Streams, collect, collect_given
from pennyweight.pipeline.journal import Journal
from pennyweight.pipeline.output import Output
from pennyweight.pipeline.records import BlockDone, SiteRecord, Tell
from pennyweight.pipeline.rescale import BlockRescaler, kept_names
from pennyweight.pipeline.rows import solve_by_rows
from pennyweight.pipeline.solve import again_measured, check_finite, solve_site
from pennyweight.pipeline.stages import stages_of
from pennyweight.schemes import QuantizedWeight
from pennyweight.solvers.learned.base import BlockProblem

# Rows that one thread puts back at a time.
_ROWS = 256


def run_blocks(
    model: StreamedModel,
    output: Output,
    journal: Journal,
    *,
    chain: Chain,
    streams: Streams | None,
    tell: Tell,
) -> list[SiteRecord]:
    """Solve and write every block that the journal does not have, and the head; returns the records of all, in order.

    Each block is calibrated on the outputs of the blocks before it as they were written; finished blocks of an earlier
    run are read back and only run. `streams` may be None where all are finished.
    """
    records: list[SiteRecord] = []
    rescaler = None
    if chain.transform is not None and streams is not None:
        rescaler = BlockRescaler(model, chain.transform, output.plan.schemes)
    total = count_blocks(model, output.plan)
    for index in range(total):
        part = f"block {index}"
        is_done = part in journal.finished
        if not is_done:
            assert streams is not None
            found, folds = _one_block(model, output, index, chain=chain, streams=streams, rescaler=rescaler)
            output.files.flush()
            journal.add(part, found, found={"rescaled": folds} if folds else {})
        elif streams is not None:
            _replay(model, output, index, streams)
        records.extend(journal.finished[part])
        tell(BlockDone(index, total, journal.finished[part], resumed=is_done))
    return records


def _one_block(
    model: StreamedModel,
    output: Output,
    index: int,
    *,
    chain: Chain,
    streams: Streams,
    rescaler: BlockRescaler | None,
) -> tuple[list[SiteRecord], tuple[str, ...]]:
    """The records of the sites of block `index`, and which of its folds were rescaled."""
    sites = _quantized(model, output, index)
    if index == len(model.blocks):
        [head] = sites
        return [_head(model, output, head, chain=chain, streams=streams)], ()
    if not sites:
        _replay(model, output, index, streams)
        return [], ()
    with model.opened(index) as block:
        for site in sites:
            # Before the block is run: what comes out of NaN would be blamed on other sites.
            check_finite(model.matrix(site), site.tensor)
        folds: tuple[str, ...] = ()
        ahead: list[Tensor] | None = None
        if rescaler is not None:
            # The block before it is rewritten: a run that resumes has no other to bring the original stream here.
            ahead = _ahead(model, block, index, streams)
            folds = _rewrite_(model, output, block, sites, streams, rescaler)
        # Later stages and refining look back at what the block was, for the original stream.
        looks_back = streams.original is not None and (chain.is_staged or chain.refine is not None)
        reference = deepcopy(block) if looks_back else None
        solved = _by_stages(
            model, output, block, sites, chain=chain, streams=streams, reference=reference, hands_on=ahead is None
        )
        if streams.original is not None and ahead is not None:
            streams.original.hidden = ahead
        if chain.refine is not None and reference is not None:
            solved = _refined(model, output, block, sites, solved, chain=chain, streams=streams, reference=reference)
        _advance(model, output, block, index, streams.quantized)
    return [solved[site.name].record for site in sites], folds


def _head(model: StreamedModel, output: Output, head: Site, *, chain: Chain, streams: Streams) -> SiteRecord:
    """The head solved on what the quantized model gives it. Nothing comes behind it: it is not run."""
    for stream in (streams.quantized, streams.original):
        if stream is not None:
            model.enter_head(stream)
    return solve_by_rows(model, output, head, chain, collect_given(head, streams))


def _quantized(model: StreamedModel, output: Output, index: int) -> list[Site]:
    """The sites of block `index` that the plan does not keep in float."""
    return [site for site in model.sites_of(index) if site.name in output.plan.schemes]


def _ahead(model: StreamedModel, block: nn.Module, index: int, streams: Streams) -> list[Tensor] | None:
    """What the block gives on the original stream."""
    if streams.original is None:
        return None
    copy = replace(streams.original, hidden=list(streams.original.hidden))
    model.advance(block, index, copy, watched=model.watched(model.sites_of(index)))
    return copy.hidden


def _rewrite_(
    model: StreamedModel,
    output: Output,
    block: nn.Module,
    sites: Sequence[Site],
    streams: Streams,
    rescaler: BlockRescaler,
) -> tuple[str, ...]:
    """Rescale the block's folds, write what is kept of them, and say which."""
    found = collect(model, block, sites, Streams(streams.quantized), has_magnitudes=True)
    rewritten = rescaler.rewrite_(block, sites, found)
    for name, tensor in rewritten.kept.items():
        output.files.write(name, output.encode_kept(name, tensor))
    return rewritten.folds


@dataclass(frozen=True)
class _Solved:
    """What is left of a solved site: its record, and what refining begins with."""

    record: SiteRecord
    weight: QuantizedWeight | None = None
    found: SiteStatistics | None = None


def _by_stages(
    model: StreamedModel,
    output: Output,
    block: nn.Module,
    sites: Sequence[Site],
    *,
    chain: Chain,
    streams: Streams,
    reference: nn.Module | None,
    hands_on: bool,
) -> dict[str, _Solved]:
    """Solve all sites and put them back, stage after stage, each on what those before it give; write them, unless they
    are to be refined. With `hands_on` the original stream goes to the next block."""
    stages = stages_of(model, block, sites, streams.quantized) if chain.is_staged else [sites]
    solved: dict[str, _Solved] = {}
    for number, stage in enumerate(stages):
        is_last = number == len(stages) - 1
        found = collect(
            model, block, stage, streams, reference=reference if number else None, hands_on=hands_on and is_last
        )
        for site in stage:
            matrix = model.matrix(site).contiguous()
            # The last site of an input lets go of its Hessian.
            statistics = found.pop(site.name)
            one = solve_site(site, matrix, output.plan.schemes[site.name], chain, statistics)
            if chain.refine is None:
                output.write(site, one.weight)
            _put_back(model, site, one.weight)
            solved[site.name] = (
                _Solved(one.record) if chain.refine is None else _Solved(one.record, one.weight, statistics)
            )
    return solved


def _refined(
    model: StreamedModel,
    output: Output,
    block: nn.Module,
    sites: Sequence[Site],
    solved: Mapping[str, _Solved],
    *,
    chain: Chain,
    streams: Streams,
    reference: nn.Module,
) -> dict[str, _Solved]:
    """Refine all sites of the block together, write them and put them back."""
    assert chain.refine is not None
    assert streams.original is not None
    originals = {site.name: model.matrix(site, reference).contiguous() for site in sites}
    refined = chain.refine.refine(
        BlockProblem(
            weights=originals,
            start={name: one.weight for name, one in solved.items() if one.weight is not None},
            forward=lambda weights, batch: model.run_with(block, sites[0].block, streams.quantized, batch, weights),
            targets=streams.original.hidden,
            seed=chain.seed,
        )
    )
    records = {}
    for site in sites:
        weight, statistics = refined.weights[site.name], solved[site.name].found
        assert statistics is not None
        output.write(site, weight)
        _put_back(model, site, weight)
        record = again_measured(site, originals[site.name], weight, statistics, solved[site.name].record)
        records[site.name] = _Solved(record)
    return records


def _put_back(model: StreamedModel, site: Site, weight: QuantizedWeight) -> None:
    """The block computes with the decoded weights from now on."""
    matrix = model.matrix(site)
    parallel_map(lambda rows: matrix[rows].copy_(weight.rows(rows).dequantize()), chunks(matrix.shape[0], _ROWS))


def _replay(model: StreamedModel, output: Output, index: int, streams: Streams) -> None:
    """Run a block that an earlier run finished, or that holds nothing to quantize, with the weights in the output."""
    with model.opened(index) as block:
        if streams.original is not None:
            _advance(model, output, block, index, streams.original)
        quantized = _quantized(model, output, index)
        for site in quantized:
            _put_back(model, site, output.read(site))
        # A transform changes norms and biases too.
        for parameter, name in kept_names(model, index, [site.name for site in quantized]).items():
            model.module.get_parameter(parameter).data.copy_(output.read_kept(name))
        _advance(model, output, block, index, streams.quantized)


def _advance(model: StreamedModel, output: Output, block: nn.Module, index: int, stream: Stream) -> None:
    if index + 1 < count_blocks(model, output.plan):
        model.advance(block, index, stream, watched=model.watched(model.sites_of(index)))
