"""Block after block: calibrate on what the quantized blocks before it give, solve, write, hand on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.core.memory import give_back_memory
from pennyweight.models.base import Checkpoint, Site
from pennyweight.models.streamed import Stream, StreamedModel
from pennyweight.pipeline.collect import SiteStatistics, collect
from pennyweight.pipeline.journal import Journal
from pennyweight.pipeline.output import Output
from pennyweight.pipeline.records import BlockDone, SiteRecord, Tell
from pennyweight.pipeline.solve import SolvedSite, check_finite, solve_site
from pennyweight.schemes.fit import Fit
from pennyweight.solvers.base import Solver, Statistics


def run_blocks(
    model: StreamedModel,
    output: Output,
    journal: Journal,
    *,
    solver: Solver,
    fit: Fit,
    stream: Stream | None,
    tell: Tell,
) -> list[SiteRecord]:
    """Solve and write every block that the journal does not have; returns the records of all, in order.

    With a `stream` each block is calibrated on the outputs of the blocks before it as they were written; finished
    blocks of an earlier run are read back and only run. Without one no block is run at all.
    """
    records: list[SiteRecord] = []
    for index in range(len(model.blocks)):
        part = f"block {index}"
        is_done = part in journal.finished
        if not is_done:
            found = _one_block(model, output, index, solver=solver, fit=fit, stream=stream)
            output.files.flush()
            journal.add(part, found)
        elif stream is not None:
            _replay(model, output, index, stream)
        records.extend(journal.finished[part])
        tell(BlockDone(index, len(model.blocks), journal.finished[part], resumed=is_done))
    return records


def _one_block(
    model: StreamedModel, output: Output, index: int, *, solver: Solver, fit: Fit, stream: Stream | None
) -> list[SiteRecord]:
    sites = [site for site in model.sites_of(index) if site.name in output.plan.schemes]
    if stream is None:
        return [_from_disk(model, output, site, solver=solver, fit=fit) for site in sites]
    with model.opened(index) as block:
        for site in sites:
            # Before the block is run: what comes out of NaN would be blamed on other sites.
            check_finite(model.matrix(site), site.tensor)
        found = collect(model, block, index, stream)
        give_back_memory()
        records = []
        for site in sites:
            # The last site of an input lets go of its Hessian.
            solved = _solve(model, output, site, solver=solver, fit=fit, found=found.pop(site.name))
            output.write(site, solved.weight)
            _put_back(model, site, solved)
            records.append(solved.record)
        give_back_memory()
        _advance(model, block, index, stream)
    return records


def _solve(
    model: StreamedModel, output: Output, site: Site, *, solver: Solver, fit: Fit, found: SiteStatistics
) -> SolvedSite:
    return solve_site(site, model.matrix(site).contiguous(), output.plan.schemes[site.name], solver, fit, found)


def _from_disk(model: StreamedModel, output: Output, site: Site, *, solver: Solver, fit: Fit) -> SiteRecord:
    """A site solved without data: its matrix alone is read, not its block."""
    matrix = stored_matrix(model.checkpoint, site).float().contiguous()
    check_finite(matrix, site.tensor)
    nothing = SiteStatistics(Statistics(), 0)
    solved = solve_site(site, matrix.to(model.device), output.plan.schemes[site.name], solver, fit, nothing)
    output.write(site, solved.weight)
    return solved.record


def stored_matrix(checkpoint: Checkpoint, site: Site) -> Tensor:
    """The matrix [out, in] of `site` in its stored type, read without what else its tensor holds."""
    if site.index is None:
        matrix = checkpoint.read(site.tensor)
    else:
        matrix = checkpoint.read(site.tensor, slice(site.index, site.index + 1))[0]
    return matrix.T if site.transposed else matrix


def _put_back(model: StreamedModel, site: Site, solved: SolvedSite) -> None:
    """The block computes with the decoded weights from now on."""
    model.matrix(site).copy_(solved.weight.dequantize(torch.float32))


def _replay(model: StreamedModel, output: Output, index: int, stream: Stream) -> None:
    """Run a block that an earlier run finished, with the weights that it wrote."""
    with model.opened(index) as block:
        for site in model.sites_of(index):
            if site.name in output.plan.schemes:
                model.matrix(site).copy_(output.read(site).dequantize(torch.float32))
        _advance(model, block, index, stream)


def _advance(model: StreamedModel, block: nn.Module, index: int, stream: Stream) -> None:
    if index + 1 < len(model.blocks):
        stream.hidden = model.run_block(block, index, stream, watched=model.watched(model.sites_of(index)))
