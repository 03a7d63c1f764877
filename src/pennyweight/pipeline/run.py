"""The main job: a model directory in, a smaller one out."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from pennyweight.containers.base import Container
from pennyweight.containers.weight_files import OpenWeightFiles
from pennyweight.core.errors import ContainerError, SpaceError, UsageError, WeightError
from pennyweight.core.files import allocated_bytes, check_space, sync_directory, sync_files, to_json, write_text
from pennyweight.core.hashing import Hashes, sha256
from pennyweight.core.memory import give_back_memory, peak_memory_bytes
from pennyweight.core.parallel import allowed_threads, one_thread_per_operation
from pennyweight.core.version import versions
from pennyweight.models import text
from pennyweight.pipeline.blind import count_blocks, solve_blocks
from pennyweight.pipeline.blocks import run_blocks
from pennyweight.pipeline.collect import Streams
from pennyweight.pipeline.costs.base import Tell as CostTell
from pennyweight.pipeline.costs.base import tell_nobody
from pennyweight.pipeline.gradients import sensitivities
from pennyweight.pipeline.job import Job
from pennyweight.pipeline.journal import NAME as JOURNAL_NAME
from pennyweight.pipeline.journal import Journal, only_writer, other_work_directories, work_directory
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.output import Output, carried_files
from pennyweight.pipeline.prepare import container_for, prepare
from pennyweight.pipeline.record import arithmetic, recorded_files, run_record, run_report, write_sidecars
from pennyweight.pipeline.records import RunReport, SiteRecord, Tell
from pennyweight.pipeline.rows import solve_without_data

__all__ = ["Finish", "container_for", "quantize"]

Verify = Callable[[Path], dict[str, Any]]
# Fills the weight files; a second call after a crash gets the journal that the first one kept.
Write = Callable[[Output, Path, Journal], list[SiteRecord]]


class Finish(Protocol):
    """What changes the weights as a whole once all blocks are written; `name` says all that shapes it, for the recipe.

    It is called again after a crash, with what it had left in `scratch`, and must then end with the same bytes.
    """

    @property
    def name(self) -> str: ...
    def check(self, job: Job) -> None:
        """Raises, before any block, what could only stop it after all of them."""

    def __call__(self, job: Job, output: Output, scratch: Path) -> dict[str, Any]:
        """Change tensors of `output` in their places; returns what goes into the record. `scratch` is a directory that
        goes away once that is journaled."""


# The journal's name for what comes after the blocks, and that of its directory.
_FINISH = "finish"
# The directory of what is kept while the model is differentiated.
_GRADIENTS = "gradients"
_NO_ROOM = "there was something to note, for which --size leaves no room"
# Room for pennyweight.json, config.json and the model card beside the weights and the carried files.
_SIDECARS_BYTES = 1 << 20
# What each site adds to pennyweight.json, config.json and the journal.
_SITE_BYTES = 2048
_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IS_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


@one_thread_per_operation()
def quantize(
    model: str,
    out: str | Path,
    options: Options = Options(),
    *,
    container: Container | None = None,
    finish: Finish | None = None,
    verify: Verify | None = None,
    tell: Tell = lambda done: None,
    tell_cost: CostTell = tell_nobody,
    evidence: Mapping[str, Any] = MappingProxyType({}),
    hashes: Hashes | None = None,
) -> RunReport:
    """Quantize the model directory or Hub id `model` into the new directory `out`.

    Every finished block is journaled beside `out`; the same call after a crash continues there and ends with the same
    bytes. `finish` may change the weights once all blocks are written. `out` appears when it is complete and
    `verify(directory)` has passed; what both return is recorded, and the `evidence` for a plan chosen by trial.
    Raises PennyweightError of the kind that fits; then `out` does not exist.
    """
    started = time.perf_counter()
    target = check_target(out)
    with tempfile.TemporaryDirectory(prefix="pennyweight-source-") as scratch:
        job = prepare(model, options, container, hashes, scratch=Path(scratch), tell=tell_cost)
        if finish is not None:
            finish.check(job)
            job = replace(job, recipe=replace(job.recipe, finish=finish.name))

        def write(output: Output, directory: Path, journal: Journal) -> list[SiteRecord]:
            records = _write_weights(job, output, directory, journal, tell)
            if finish is not None:
                _finish(job, output, directory, journal, finish)
            return records

        found = {"budget": evidence} if evidence else {}
        return produce(job, target, write, verify=verify, started=started, found=found)


def produce(
    job: Job, target: Path, write: Write, *, verify: Verify | None, started: float, found: Mapping[str, Any]
) -> RunReport:
    """The artefact of `job` at `target`, or nothing there: `write` fills its weight files, `verify` proves them.
    `found` goes into the record; `started`: time.perf_counter() when it all began."""
    directory = work_directory(target, job.recipe, {**versions(), **arithmetic(job)})
    with _unfinished(directory), _room(target.parent):
        directory.mkdir(exist_ok=True)
        with only_writer(directory):
            report = _make(job, target, directory, write, verify=verify, started=started, found=found)
            sync_files(directory)
            _publish(directory, target)
    sync_directory(target.parent)
    return report


def check_target(out: str | Path) -> Path:
    """Where the output will be; raises UsageError where it cannot be there."""
    target = Path(out).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory: choose another --out, or remove it")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} does not exist: create it, or choose another --out")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{target.parent} may not be written to: choose another --out")
    return target


def _publish(directory: Path, target: Path) -> None:
    """The journal goes last: until the output has its name, it is what says that there is work to keep."""
    try:
        os.rename(directory, target)
    except OSError as error:
        if error.errno not in _IS_TAKEN:
            raise
        raise UsageError(
            f"{target} came to exist while this run worked; its finished work is kept in {directory}: move {target} "
            "away and give the same command again"
        ) from error
    (target / JOURNAL_NAME).unlink(missing_ok=True)


@contextmanager
def _unfinished(directory: Path) -> Iterator[None]:
    """Whatever ends a run early says what is kept for the next one, and nothing is kept without a finished block."""
    try:
        yield
    except UsageError:
        raise
    except BaseException as error:
        blocks = Journal.open(directory).blocks if directory.is_dir() else 0
        # A damaged weight is replaced by another model, which another work directory belongs to.
        if blocks == 0 or isinstance(error, WeightError):
            shutil.rmtree(directory, ignore_errors=True)
        else:
            error.add_note(f"{blocks} finished blocks are kept in {directory}: the same command continues there")
        raise


@contextmanager
def _room(parent: Path) -> Iterator[None]:
    try:
        yield
    except SpaceError:
        raise
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        raise SpaceError(error.errno, f"{parent}: no space is left for the output: make room there") from error


def _make(job: Job, target: Path, directory: Path, write: Write, *, verify: Verify | None, started: float,
          found: Mapping[str, Any]) -> RunReport:  # fmt: skip
    """Fill the work directory: weights, what travels with them, the records."""
    with _opened(job, target, directory) as files:
        journal = Journal.open(directory)
        resumed = journal.blocks
        output = Output(files, job.container, job.plan, job.model.checkpoint)
        records = write(output, directory, journal)
        hashes = files.sha256()
    write_sidecars(job, directory, records)
    report = run_report(job, target, records)
    report.resumed_blocks = resumed
    report.leftovers = other_work_directories(target, directory)
    report.seconds = round(time.perf_counter() - started, 3)
    report.peak_memory_bytes = peak_memory_bytes()
    # The runtime that verifies is another process.
    give_back_memory()
    verification = verify(directory) if verify else {"verified": "none"}
    report.verified, report.verification = str(verification["verified"]), verification
    outputs = {name: hashes.get(name) or sha256(directory / name) for name in recorded_files(directory)}
    found = {**journal.found, **found}
    write_text(directory / "run.json", to_json(_measured(report)))
    # Should all notes be longer than anybody foresaw, a size that was promised comes first.
    for notes in (records, [replace(record, notes=record.notes and (_NO_ROOM,)) for record in records]):
        write_text(directory / "pennyweight.json", to_json(run_record(job, notes, verification, found, outputs)))
        report.size_bytes = _output_bytes(directory)
        if report.budget_bytes is None or report.size_bytes <= report.budget_bytes:
            break
    return report


def _output_bytes(directory: Path) -> int:
    files = (file for file in directory.rglob("*") if file.is_file() and file.name != JOURNAL_NAME)
    return sum(file.stat().st_size for file in files)


def _finish(job: Job, output: Output, directory: Path, journal: Journal, finish: Finish) -> None:
    scratch = directory / _FINISH
    if _FINISH not in journal.finished:
        scratch.mkdir(exist_ok=True)
        found = finish(job, output, scratch)
        output.files.flush()
        journal.add(_FINISH, [], found=found)
    # Not before the journal: a second call would begin with values that are already changed.
    shutil.rmtree(scratch, ignore_errors=True)


def _measured(report: RunReport) -> dict[str, Any]:
    """What is not the same for the same inputs; verification apart."""
    verification = report.verification
    return {
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "threads": allowed_threads(),
        "resumed_blocks": report.resumed_blocks,
        "verify_seconds": verification.get("seconds", 0.0),
        "verify_peak_memory_bytes": verification.get("peak_memory_bytes", 0),
    }


def _opened(job: Job, target: Path, directory: Path) -> OpenWeightFiles:
    """The work directory with weight files of full length, new or from an earlier run with the same recipe."""
    carried = sum(file.stat().st_size for file in carried_files(job.model.path))
    needed = job.layout.size_bytes + carried + _SIDECARS_BYTES + len(job.sites) * _SITE_BYTES
    check_space(target.parent, needed - allocated_bytes(directory))
    if Journal.open(directory).finished:
        try:
            return job.layout.reopen(directory)
        except ContainerError:
            # Somebody has been at the files: there is nothing to continue.
            pass
    for file in directory.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    return job.layout.create(directory)


def _write_weights(job: Job, output: Output, directory: Path, journal: Journal, tell: Tell) -> list[SiteRecord]:
    if "kept" not in journal.finished:
        output.copy_kept(output.kept_tensors(job.listed))
        journal.add("kept", [])
    embedding = job.embedding
    records: list[SiteRecord] = []
    if embedding is not None:
        if "embedding" not in journal.finished:
            found = solve_without_data(job.model, output, [embedding], job.blind, job.known)
            output.files.flush()
            journal.add("embedding", found)
        records = journal.finished["embedding"]
    if job.windows is None:
        solved = solve_blocks(job.model, output, journal, chain=job.options.chain, known=job.known, tell=tell)
    else:
        streams = _start(job, output, directory, journal, job.windows)
        solved = run_blocks(job.streamed, output, journal, chain=job.options.chain, streams=streams, tell=tell)
    return [*records, *solved]


def _start(job: Job, output: Output, directory: Path, journal: Journal, windows: Sequence[Tensor]) -> Streams | None:
    # What an interrupted run left there.
    shutil.rmtree(directory / _GRADIENTS, ignore_errors=True)
    model, chain = job.streamed, job.options.chain
    if journal.blocks == count_blocks(model, job.plan):
        return None
    batches = text.batches(windows)
    sensitive = None
    if job.options.loss_aware:
        has_head = count_blocks(model, job.plan) > len(model.blocks)
        scratch = directory / _GRADIENTS
        sensitive = sensitivities(model, batches, scratch, seed=job.options.seed, has_head=has_head)
    embedding = job.embedding
    if embedding is None:
        return Streams.of(model.start(batches), has_original=chain.needs_original, sensitive=sensitive)
    quantized = model.start(batches, embedding=partial(output.embedding_rows, embedding))
    return Streams(quantized, model.start(batches) if chain.needs_original else None, sensitive)
