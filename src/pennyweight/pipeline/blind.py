"""Blocks that are solved without being run: on nothing, or on what is known of their inputs beforehand."""

from __future__ import annotations

from collections.abc import Mapping

from pennyweight.models.base import StoredModel
from pennyweight.pipeline.chain import Chain
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.pipeline.journal import Journal
from pennyweight.pipeline.output import Output
from pennyweight.pipeline.records import BlockDone, SiteRecord, Tell
from pennyweight.pipeline.rows import solve_without_data
from pennyweight.plan.plan import Plan


def solve_blocks(
    model: StoredModel,
    output: Output,
    journal: Journal,
    *,
    chain: Chain,
    known: Mapping[str, SiteStatistics],
    tell: Tell,
) -> list[SiteRecord]:
    """Solve and write every block that the journal does not have, and the head; returns the records of all, in order.

    `known` has statistics by site, of those of which there are any.
    """
    records: list[SiteRecord] = []
    total = count_blocks(model, output.plan)
    for index in range(total):
        part = f"block {index}"
        is_done = part in journal.finished
        if not is_done:
            sites = [site for site in model.sites_of(index) if site.name in output.plan.schemes]
            found = solve_without_data(model, output, sites, chain, known)
            output.files.flush()
            journal.add(part, found)
        records.extend(journal.finished[part])
        tell(BlockDone(index, total, journal.finished[part], resumed=is_done))
    return records


def count_blocks(model: StoredModel, plan: Plan) -> int:
    """How many there are to go through: a head that has a scheme comes as one more, behind the last."""
    return len(model.blocks) + (model.head is not None and model.head.name in plan.schemes)
