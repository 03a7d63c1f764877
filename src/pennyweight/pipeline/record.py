"""What lies beside the weights of an artefact: config, carried files, model card, and the record of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pennyweight.core.files import write_text
from pennyweight.core.version import versions
from pennyweight.kernels.native import kernel_table
from pennyweight.pipeline.card import model_card
from pennyweight.pipeline.job import Job
from pennyweight.pipeline.journal import NAME as JOURNAL_NAME
from pennyweight.pipeline.output import carried_files, carry, config_text
from pennyweight.pipeline.records import RunReport, SiteRecord
from pennyweight.pipeline.sizes import weight_count

RECORD_NAME = "pennyweight.json"
_NOT_RECORDED = {RECORD_NAME, JOURNAL_NAME, "run.json"}
_MEASURED = {"seconds", "peak_memory_bytes"}


def write_sidecars(job: Job, directory: Path, records: Sequence[SiteRecord]) -> None:
    """Everything beside the weights but the record of the run."""
    carry(job.model.path, carried_files(job.model.path), directory)
    config = config_of(job)
    if config is not None:
        write_text(directory / "config.json", config)
    notes = sum(bool(record.notes) for record in records)
    write_text(directory / "README.md", card_of(job, notes=notes))


def config_of(job: Job) -> str | None:
    """config.json; None for a GGUF file that came without one."""
    if not (job.model.path / "config.json").is_file():
        return None
    quantization = job.container.config(job.plan, job.listed, job.facts, runtime=job.options.runtime)
    changes = job.model.checkpoint.config_changes
    return config_text(job.model.path, quantization, dtype=job.facts.dtype, changes=changes)


def card_of(job: Job, *, notes: int) -> str:
    """README.md; `notes`: how many sites have some."""
    usage = job.container.usage(is_decoder=job.model.is_decoder)
    return model_card(job.model.path, job.recipe, job.plan, name=job.model_name, notes=notes, usage=usage)


def recorded_files(directory: Path) -> list[str]:
    """Names of the files of an output whose hashes its record has."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file() and file.name not in _NOT_RECORDED)
    return [str(file.relative_to(directory)) for file in files]


def arithmetic(job: Job) -> dict[str, str]:
    """What the bytes depend on beside recipe and versions: the processor and the build decide it."""
    return {
        "kernels": kernel_table() or "torch",
        "calibration": "bfloat16" if job.model.calibrates_in_bfloat16 else "float32",
    }


def run_report(job: Job, target: Path, records: Sequence[SiteRecord]) -> RunReport:
    """What can be said before the result is verified and measured."""
    budget = job.options.budget
    sites = job.quantized
    bits = sum(job.plan.schemes[site.name].storage_bits(site.shape) for site in sites)
    tensor_bytes = sum(info.size_bytes for info in job.entries.values())
    return RunReport(
        out=str(target),
        budget_bytes=None if budget is None or budget.kind != "size" else int(budget.value),
        bpw=round(8 * tensor_bytes / weight_count(job.model), 4),
        bpw_sites=round(bits / sum(site.weights for site in sites), 4),
        sites=len(sites),
        kept=dict(job.plan.kept),
        changed=dict(job.plan.changed),
        fallbacks={record.name: list(record.notes) for record in records if record.notes},
        notes=list(job.notes),
    )


def run_record(
    job: Job,
    records: Sequence[SiteRecord],
    verification: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, str],
) -> dict[str, Any]:
    """pennyweight.json: the same for the same inputs, however long it took; `outputs`: hashes of all files by name."""
    return {
        "recipe": job.recipe,
        "versions": versions(),
        "arithmetic": arithmetic(job),
        "notes": job.notes,
        "decoded_from": job.model.checkpoint.decoded_from,
        "plan": {
            "schemes": {name: scheme.name for name, scheme in job.plan.schemes.items()},
            "kept": job.plan.kept,
            "changed": job.plan.changed,
        },
        "sites": list(records),
        "fallbacks": {record.name: record.notes for record in records if record.notes},
        "found": found,
        "unused_tensors": job.model.unused,
        "outputs": outputs,
        "verification": {key: value for key, value in verification.items() if key not in _MEASURED},
    }
