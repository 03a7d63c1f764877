"""What lies beside the weights of an artefact: config, carried files, model card, and the record of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pennyweight.core.files import write_text
from pennyweight.core.hashing import sha256
from pennyweight.core.version import versions
from pennyweight.kernels.native import kernel_table
from pennyweight.pipeline.card import model_card
from pennyweight.pipeline.journal import NAME as JOURNAL_NAME
from pennyweight.pipeline.output import carried_files, carry, write_config
from pennyweight.pipeline.prepare import Job
from pennyweight.pipeline.records import RunReport, SiteRecord
from pennyweight.pipeline.sizes import weight_count

RECORD_NAME = "pennyweight.json"
_NOT_RECORDED = {RECORD_NAME, JOURNAL_NAME, "run.json"}
_MEASURED = {"seconds", "peak_memory_bytes"}


def write_sidecars(job: Job, directory: Path, records: Sequence[SiteRecord]) -> None:
    """Everything beside the weights but the record of the run."""
    config = job.container.config(job.plan, job.model.sites, job.facts, runtime=job.options.runtime)
    carry(job.model.path, carried_files(job.model.path), directory)
    changes = job.model.checkpoint.config_changes
    write_config(job.model.path, directory, config, dtype=job.facts.dtype, changes=changes)
    card = model_card(
        job.model.path,
        job.recipe,
        job.plan,
        name=job.model_name,
        notes=sum(bool(record.notes) for record in records),
        is_decoder=job.model.is_decoder,
    )
    write_text(directory / "README.md", card)


def arithmetic(job: Job) -> dict[str, str]:
    """What the bytes depend on beside recipe and versions: the processor and the build decide it."""
    return {
        "kernels": kernel_table() or "torch",
        "calibration": "bfloat16" if job.model.calibrates_in_bfloat16 else "float32",
    }


def run_report(job: Job, target: Path, records: Sequence[SiteRecord]) -> RunReport:
    """What can be said before the result is verified and measured."""
    sites = [site for site in job.model.sites if site.name in job.plan.schemes]
    bits = sum(job.plan.schemes[site.name].storage_bits(site.shape) for site in sites)
    tensor_bytes = sum(info.size_bytes for info in job.entries.values())
    return RunReport(
        out=str(target),
        bpw=round(8 * tensor_bytes / weight_count(job.model), 4),
        bpw_sites=round(bits / sum(site.weights for site in sites), 4),
        sites=len(sites),
        kept=dict(job.plan.kept),
        changed=dict(job.plan.changed),
        fallbacks={record.name: list(record.notes) for record in records if record.notes},
    )


def run_record(
    job: Job,
    directory: Path,
    records: Sequence[SiteRecord],
    verification: dict[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """pennyweight.json: the same for the same inputs, however long it took; `hashes` of the weight files by name."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file() and file.name not in _NOT_RECORDED]
    names = [str(file.relative_to(directory)) for file in files]
    return {
        "recipe": job.recipe,
        "versions": versions(),
        "arithmetic": arithmetic(job),
        "decoded_from": job.model.checkpoint.decoded_from,
        "plan": {
            "schemes": {name: scheme.name for name, scheme in job.plan.schemes.items()},
            "kept": job.plan.kept,
            "changed": job.plan.changed,
        },
        "sites": list(records),
        "fallbacks": {record.name: record.notes for record in records if record.notes},
        "found": found,
        "unused_tensors": job.model.weights.unused,
        "outputs": {name: hashes.get(name) or sha256(directory / name) for name in names},
        "verification": {key: value for key, value in verification.items() if key not in _MEASURED},
    }
