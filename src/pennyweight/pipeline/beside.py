"""How large an output will be, all of it, before any of it is there."""

from __future__ import annotations

from pennyweight.core.files import to_json
from pennyweight.pipeline.job import Job
from pennyweight.pipeline.output import carried_files
from pennyweight.pipeline.record import card_of, config_of, run_record
from pennyweight.pipeline.records import SiteRecord

# What is not known of the records beforehand: notes of a site, here and in the list of fallbacks; what a block had to
# say; verification, recovery and the times of the run.
_NOTES, _FOUND, _REST = 400, 200, 4096
# As long as a number can be.
_NUMBER = -1.2345678901234567e-100


def output_bytes(job: Job) -> int:
    """At most so many bytes: weight files with their headers and index, files carried along, config, card, records."""
    model = job.model
    sites = job.quantized
    note = "x" * (_NOTES // 2)
    records = [
        SiteRecord(site.name, job.plan.schemes[site.name].name, _NUMBER, _NUMBER, 10**9, (note,)) for site in sites
    ]
    carried = carried_files(model.path)
    names = [*job.layout.sizes, *(str(file.relative_to(model.path)) for file in carried), "config.json", "README.md"]
    record = run_record(job, records, {}, {}, dict.fromkeys(names, "0" * 64))
    texts = (config_of(job) or "", card_of(job, notes=len(records)), to_json(record))
    return (
        job.layout.size_bytes
        + sum(file.stat().st_size for file in carried)
        + sum(len(text.encode()) for text in texts)
        + _FOUND * (len(model.blocks) + 1)
        + _REST
    )
