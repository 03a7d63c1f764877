"""The main job: a model directory in, a smaller one out."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.containers.base import Container, ModelFacts
from pennyweight.containers.weight_files import OpenWeightFiles, WeightFiles
from pennyweight.core.errors import ContainerError, UsageError
from pennyweight.core.files import check_space, sha256, sync_directory, to_json, write_text
from pennyweight.core.memory import peak_memory_bytes
from pennyweight.core.registry import find, provided
from pennyweight.models import text
from pennyweight.models.hub import resolve
from pennyweight.models.streamed import Stream, StreamedModel
from pennyweight.pipeline.blocks import run_blocks
from pennyweight.pipeline.card import model_card
from pennyweight.pipeline.journal import Journal, work_directory
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.output import Output, carried_files, carry, weight_entries, write_config
from pennyweight.pipeline.records import CalibrationRecipe, Recipe, RunReport, SiteRecord, Tell
from pennyweight.plan.plan import Plan
from pennyweight.plan.uniform import uniform_plan
from pennyweight.schemes import parse_scheme
from pennyweight.core.version import versions

Verify = Callable[[Path], dict[str, Any]]
# Room for pennyweight.json, config.json and the model card beside the weights and the carried files.
_SIDECARS_BYTES = 1 << 20


@dataclass(frozen=True)
class _Job:
    """A run that has been checked and planned; nothing has been written."""

    model: StreamedModel
    container: Container
    plan: Plan
    facts: ModelFacts
    layout: WeightFiles
    recipe: Recipe
    windows: Tensor | None
    options: Options


def quantize(
    model: str,
    out: str | Path,
    options: Options = Options(),
    *,
    container: Container | None = None,
    verify: Verify | None = None,
    tell: Tell = lambda done: None,
) -> RunReport:
    """Quantize the model directory or Hub id `model` into the new directory `out`.

    Every finished block is journaled beside `out`; the same call after a crash continues there and ends with the same
    bytes. `out` appears when it is complete and `verify(directory)` has passed; what verify returns is recorded.
    Raises PennyweightError of the kind that fits; then `out` does not exist.
    """
    started = time.perf_counter()
    target = _check_target(out)
    job = _prepare(model, options, container or container_for(options.runtime))
    directory = work_directory(target, job.recipe, versions()["pennyweight"])
    with _opened(job, target, directory) as files:
        journal = Journal.open(directory)
        resumed = len(journal.finished)
        records = _write_weights(job, files, directory, journal, tell)
    report = _report(job, target, records, resumed_blocks=max(0, resumed - 1))
    _write_sidecars(job, directory, records)
    solved = time.perf_counter()
    solved_memory = peak_memory_bytes()
    verification = verify(directory) if verify else {"verified": "none"}
    report.verified = str(verification["verified"])
    report.verification = verification
    _complete(job, directory, journal, records, verification)
    report.size_bytes = _size(directory)
    report.seconds = round(solved - started, 3)
    report.peak_memory_bytes = solved_memory
    times = {"seconds": report.seconds, "peak_memory_bytes": solved_memory, "threads": torch.get_num_threads()}
    times |= {"verify_seconds": round(time.perf_counter() - solved, 3), "resumed_blocks": report.resumed_blocks}
    write_text(directory / "run.json", to_json(times))
    report.size_bytes = _size(directory)
    os.rename(directory, target)
    sync_directory(target.parent)
    return report


def container_for(runtime: str) -> Container:
    """The container that `runtime` reads; raises UsageError that lists the runtimes."""
    known: dict[str, Container] = {}
    for candidate in provided("containers").values():
        known.update(dict.fromkeys(candidate.runtimes, candidate))
    if runtime not in known:
        raise UsageError(f"--for {runtime}: not a runtime that is supported; choose from {', '.join(sorted(known))}")
    return known[runtime]


def _check_target(out: str | Path) -> Path:
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory: choose another --out, or remove it")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} does not exist: create it, or choose another --out")
    return target


def _prepare(model: str, options: Options, container: Container) -> _Job:
    path = resolve(model, trust_remote_code=options.trust_remote_code)
    solver = find("solvers", options.solver)
    with ThreadPoolExecutor(1) as background:
        # Hashing reads the whole model once; it runs while transformers is imported and text is tokenized.
        hashes = background.submit(_input_hashes, path)
        streamed = StreamedModel(path, trust_remote_code=options.trust_remote_code, device=options.device)
        facts = _facts(streamed)
        plan = _plan(streamed, facts, options, container)
        source = options.calibration_source(needs_hessian=solver.needs_hessian)
        if source is None and solver.needs_hessian:
            raise UsageError(
                f"--solver {solver.name} needs calibration data: drop --calibration none, or use --solver nearest"
            )
        windows = None if source is None else _windows(streamed, source, options)
        recipe = _recipe(streamed, options, container, source, windows, hashes)
    layout = WeightFiles.plan(weight_entries(container, plan, streamed.sites, streamed.checkpoint))
    return _Job(streamed, container, plan, facts, layout, recipe, windows, options)


def _input_hashes(path: Path) -> dict[str, str]:
    names = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
    files = sorted({file for pattern in names for file in path.glob(pattern) if file.is_file()})
    return {file.name: sha256(file) for file in files}


def _facts(model: StreamedModel) -> ModelFacts:
    kinds = [info.dtype for info in model.checkpoint.tensors.values() if info.dtype.is_floating_point]
    common = max(set(kinds), key=kinds.count)
    return ModelFacts(
        model_type=model.config.model_type,
        linear_names=model.linear_names(),
        tied_head=model.tied_head,
        dtype=str(common).removeprefix("torch."),
    )


def _plan(model: StreamedModel, facts: ModelFacts, options: Options, container: Container) -> Plan:
    sites = {site.name: site for site in model.sites}
    asked = parse_scheme(options.scheme)
    dtypes = {name: model.checkpoint.tensors[site.tensor].dtype for name, site in sites.items()}
    scheme = asked.with_scale_dtype(max(set(dtypes.values()), key=list(dtypes.values()).count)) if dtypes else asked
    plan = uniform_plan(
        {name: site.shape for name, site in sites.items()},
        scheme,
        lambda candidate, name: container.why_not(candidate, sites[name], runtime=options.runtime),
    )
    plan = Plan(plan.schemes, {**plan.kept, **model.refused}, plan.changed)
    if not plan.schemes:
        reasons = sorted(set(plan.kept.values()))
        raise ContainerError(
            f"{container.name} cannot hold any weight of this model as {options.scheme}: {'; '.join(reasons[:3]) or 'it has no linear maps'}"
        )
    if reason := container.why_not_plan(plan, model.sites, facts, runtime=options.runtime):
        raise ContainerError(f"{container.name} for {options.runtime} cannot hold this plan: {reason}")
    return plan


def _windows(model: StreamedModel, source: str | tuple[str, ...], options: Options) -> Tensor:
    tokenizer = text.load_tokenizer(model.path, trust_remote_code=options.trust_remote_code)
    length = min(options.length, text.context_length(model.config) or options.length)
    documents = text.documents(source, tokenizer) if isinstance(source, str) else source
    windows = text.windows(documents, tokenizer, length=length, count=options.samples, seed=options.seed)
    text.check_vocabulary(windows, model.config, [str(model.path)])
    return windows


def _recipe(
    model: StreamedModel,
    options: Options,
    container: Container,
    source: str | tuple[str, ...] | None,
    windows: Tensor | None,
    hashes: Future[dict[str, str]],
) -> Recipe:
    calibration = None
    if windows is not None and source is not None:
        digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        calibration = CalibrationRecipe(
            source if isinstance(source, str) else "texts", windows.shape[0], windows.shape[1], options.seed, digest
        )
    return Recipe(
        scheme=options.scheme,
        solver=options.solver,
        fit=options.fit,
        runtime=options.runtime,
        container=container.name,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        calibration=calibration,
        inputs=hashes.result(),
    )


def _opened(job: _Job, target: Path, directory: Path) -> OpenWeightFiles:
    """The work directory with weight files of full length, new or from an earlier run with the same recipe."""
    carried = sum(file.stat().st_size for file in carried_files(job.model.path))
    if directory.exists() and (directory / "journal.jsonl").exists():
        return job.layout.reopen(directory)
    check_space(target.parent, job.layout.size_bytes + carried + _SIDECARS_BYTES)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        return job.layout.create(directory)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _write_weights(
    job: _Job, files: OpenWeightFiles, directory: Path, journal: Journal, tell: Tell
) -> list[SiteRecord]:
    output = Output(files, job.container, job.plan, job.model.checkpoint)
    try:
        if "kept" not in journal.finished:
            output.copy_kept(output.kept_tensors(job.model.sites))
            output.files.flush()
            journal.add("kept", [])
        solver = find("solvers", job.options.solver)
        stream = _start(job, journal)
        return run_blocks(job.model, output, journal, solver=solver, fit=job.options.fit, stream=stream, tell=tell)
    except KeyboardInterrupt:
        raise
    except Exception:
        # Without a finished block there is nothing to resume: leave no trace.
        if set(journal.finished) <= {"kept"}:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def _start(job: _Job, journal: Journal) -> Stream | None:
    if job.windows is None or len(journal.finished) > len(job.model.blocks):
        return None
    return job.model.start(text.batches(job.windows))


def _report(job: _Job, target: Path, records: Sequence[SiteRecord], *, resumed_blocks: int) -> RunReport:
    sites = [site for site in job.model.sites if site.name in job.plan.schemes]
    bits = sum(job.plan.schemes[site.name].storage_bits(site.shape) for site in sites)
    weights = sum(_count(info.shape) for info in job.model.checkpoint.tensors.values())
    return RunReport(
        out=str(target),
        size_bytes=0,
        budget_bytes=None,
        bpw=round(8 * _tensor_bytes(job) / weights, 4),
        bpw_sites=round(bits / sum(site.weights for site in sites), 4),
        sites=len(sites),
        kept=dict(job.plan.kept),
        changed=dict(job.plan.changed),
        fallbacks={record.name: list(record.notes) for record in records if record.notes},
        seconds=0.0,
        peak_memory_bytes=0,
        verified="none",
        resumed_blocks=resumed_blocks,
    )


def _tensor_bytes(job: _Job) -> int:
    entries = weight_entries(job.container, job.plan, job.model.sites, job.model.checkpoint)
    return sum(info.size_bytes for info in entries.values())


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _write_sidecars(job: _Job, directory: Path, records: Sequence[SiteRecord]) -> None:
    config = job.container.config(job.plan, job.model.sites, job.facts, runtime=job.options.runtime)
    carry(carried_files(job.model.path), directory)
    write_config(job.model.path, directory, config)
    write_text(directory / "README.md", model_card(job.model.path, job.recipe, job.plan, records))


def _complete(
    job: _Job, directory: Path, journal: Journal, records: Sequence[SiteRecord], verification: dict[str, Any]
) -> None:
    """Write pennyweight.json, the record that is the same for the same inputs, and close the journal."""
    outputs = {
        file.name: file for file in sorted(directory.iterdir()) if file.name not in ("journal.jsonl", "run.json")
    }
    record = {
        "recipe": job.recipe,
        "versions": versions(),
        "decoded_from": job.model.checkpoint.decoded_from,
        "plan": {
            "schemes": {name: scheme.name for name, scheme in job.plan.schemes.items()},
            "kept": job.plan.kept,
            "changed": job.plan.changed,
        },
        "sites": list(records),
        "unused_tensors": job.model.weights.unused,
        "outputs": {name: sha256(file) for name, file in outputs.items()},
        "verification": {
            key: value for key, value in verification.items() if key not in ("seconds", "peak_memory_bytes")
        },
    }
    write_text(directory / "pennyweight.json", to_json(record))
    journal.discard()


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())
