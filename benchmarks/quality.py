"""The quality table: what every width and solver costs, on real models, beside llm-compressor on the shipped one.

    python -m benchmarks.quality [--models demo,stories260K,minilm] [--schemes int4-g128,int3-g128] [--quick]
                                 [--peers | --no-peers] [--data DIR] [--out FILE]

Every run is a process of its own (`pennyweight quantize --verify none`), measured from start to end. Each artefact is
judged window by window against its original, so that two solvers are compared in pairs: the table has the mean of
the differences and its standard error. `nearest` is data-free, as is its default. The peer gets the very same
calibration tokens, and its artefact is decoded and judged by the same code; its results are kept in benchmarks/.cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks import llm_compressor
from benchmarks.judges import Score, paired
from benchmarks.processes import measure
from benchmarks.results_file import ROOT, cache, circumstances, heading, mib, note, project_environment, save, table
from benchmarks.subjects import SUBJECTS, Subject
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel
from pennyweight.schemes import parse_scheme

OURS, PEER = "pennyweight", "llm-compressor"
SOLVERS = ("nearest", "gptq")
# "int8 KL under 1e-3"
_LARGEST_LOSS_AT_8_BITS = 1e-3
# Differences count from so many standard errors on.
_ERRORS = 2.0


@dataclass
class Row:
    """One artefact. `versus_nearest`, `versus_peer`: mean and standard error of this loss less the other's, paired."""

    model: str
    scheme: str
    solver: str
    tool: str
    bpw: float
    loss: float
    loss_stderr: float
    other: dict[str, float]
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    tokens_sha256: str | None
    notes: dict[str, Any] = field(default_factory=dict)
    versus_nearest: tuple[float, float] | None = None
    versus_peer: tuple[float, float] | None = None
    loss_to_peer: float | None = None
    verdict: str = ""


def measure_subject(subject: Subject, work: Path, schemes: Sequence[str], *, has_peer: bool) -> list[Row]:
    """The rows of one model, in the order of the table, with their verdicts."""
    tokens = _calibration_tokens(subject, work)
    rows: list[Row] = []
    for scheme in schemes:
        scores: dict[tuple[str, str], Score] = {}
        made: dict[tuple[str, str], Row] = {}
        tools = [OURS, PEER] if has_peer and scheme in subject.peer_schemes else [OURS]
        for tool, solver in ((tool, solver) for tool in tools for solver in SOLVERS):
            one = _ours if tool == OURS else _peer
            row, score = one(subject, work, scheme=scheme, solver=solver, tokens=tokens)
            made[tool, solver], scores[tool, solver] = row, score
            note(f"  {scheme} {solver} {tool}: {subject.judge.loss} {row.loss:.3g}, {row.seconds:.0f} s")
        _compare(made, scores)
        rows.extend(made.values())
    return rows


def _calibration_tokens(subject: Subject, work: Path) -> Path:
    """The windows that our pipeline will draw, in a file for the peer."""
    tokenizer = text.load_tokenizer(subject.path)
    length = min(subject.length, text.context_length(StreamedModel(subject.path).config) or subject.length)
    documents = text.documents(subject.calibration, tokenizer)
    windows = text.windows(documents, tokenizer, length=length, count=subject.samples, seed=0)
    path = work / f"{subject.name}-tokens.safetensors"
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    save_file({"input_ids": windows.contiguous()}, path, metadata={"sha256": digest})
    path.with_suffix(".sha256").write_text(digest, encoding="utf-8")
    return path


def _ours(subject: Subject, work: Path, *, scheme: str, solver: str, tokens: Path) -> tuple[Row, Score]:
    out = work / f"{subject.name}-{scheme}-{solver}"
    command = [sys.executable, "-m", "pennyweight.cli.main", "quantize", subject.path, "--out", out, "--json"]
    command += ["--scheme", scheme, "--solver", solver, "--verify", "none"]
    if solver == "gptq":
        command += ["--calibration", subject.calibration, "--seed", "0"]
        command += ["--samples", str(subject.samples), "--length", str(subject.length)]
    done = measure(command, environment=project_environment())
    said = json.loads(done.stdout)
    used = json.loads((out / "pennyweight.json").read_text(encoding="utf-8"))["recipe"]["calibration"]
    digest = None if used is None else used["tokens_sha256"]
    if digest not in (None, tokens.with_suffix(".sha256").read_text(encoding="utf-8")):
        raise RuntimeError(f"{subject.name}: the pipeline drew other calibration windows than the peer was given")
    score = subject.judge.score(out)
    shutil.rmtree(out)
    notes = {name: said[name] for name in ("bpw_sites", "sites", "kept", "changed", "fallbacks")}
    return _row(subject, scheme, solver, OURS, score, done, digest, notes), score


def _peer(subject: Subject, work: Path, *, scheme: str, solver: str, tokens: Path) -> tuple[Row, Score]:
    given = tokens if solver == "gptq" else None
    done = llm_compressor.quantized(subject.path, scheme=scheme, solver=solver, tokens=given)
    digest = tokens.with_suffix(".sha256").read_text(encoding="utf-8") if given else None
    score = subject.judge.score(done.artefact)
    return _row(subject, scheme, solver, PEER, score, done, digest, {"said": done.said}), score


def _row(
    subject: Subject,
    scheme: str,
    solver: str,
    tool: str,
    score: Score,
    took: Any,
    digest: str | None,
    notes: dict[str, Any],
) -> Row:
    loss, error = score.mean_and_error
    return Row(
        model=subject.name,
        scheme=scheme,
        solver=solver,
        tool=tool,
        bpw=round(score.bpw, 4),
        loss=loss,
        loss_stderr=error,
        other=score.other,
        seconds=round(took.seconds, 2),
        cpu_seconds=round(took.cpu_seconds, 2),
        peak_memory_bytes=took.peak_memory_bytes,
        tokens_sha256=digest,
        notes=notes,
    )


def _compare(made: dict[tuple[str, str], Row], scores: dict[tuple[str, str], Score]) -> None:
    """Fill in the differences and the verdicts of one scheme."""
    bits = parse_scheme(made[OURS, "nearest"].scheme).element.bits
    for (tool, solver), row in made.items():
        if solver == "gptq":
            row.versus_nearest = paired(scores[tool, "gptq"], scores[tool, "nearest"])
        if tool == OURS and (PEER, solver) in scores:
            row.versus_peer = paired(scores[OURS, solver], scores[PEER, solver])
            row.loss_to_peer = row.loss / made[PEER, solver].loss
        if tool == OURS:
            row.verdict = "; ".join(_verdicts(row, bits))


def _verdicts(row: Row, bits: int) -> list[str]:
    found = []
    if bits == 8:
        found.append(_held(row.loss < _LARGEST_LOSS_AT_8_BITS, "under 1e-3"))
    if row.versus_nearest is not None:
        difference, error = row.versus_nearest
        if bits == 8:
            found.append(_held(difference <= _ERRORS * error, "not above nearest by > 2 se"))
        else:
            found.append(_held(difference < -_ERRORS * error, "below nearest by > 2 se"))
    if row.versus_peer is not None and row.solver == "gptq":
        found.append(_held(row.versus_peer[0] <= 0, "at most the peer's"))
    return found


def _held(is_so: bool, claim: str) -> str:
    return claim if is_so else f"**NOT** {claim}"


def as_markdown(subject: Subject, rows: Sequence[Row]) -> str:
    """The section of one model."""
    judge = subject.judge
    beside = list(rows[0].other)
    head = ["scheme", "solver", "tool", "bpw", "of sites", f"{judge.loss} ± se"]
    head += [_shown(name, judge.reference) for name in beside]
    head += ["s", "MiB", "gptq - nearest", "ours / peer", "verdict"]
    lines = [
        [
            row.scheme,
            row.solver,
            row.tool,
            f"{row.bpw:.2f}",
            f"{row.notes['bpw_sites']:.3f}" if "bpw_sites" in row.notes else "",
            f"{row.loss:.3g} ± {row.loss_stderr:.1g}",
            *(f"{row.other[name]:.4g}" for name in beside),
            f"{row.seconds:.1f}",
            mib(row.peak_memory_bytes),
            "" if row.versus_nearest is None else f"{row.versus_nearest[0]:+.3g} ± {row.versus_nearest[1]:.1g}",
            "" if row.loss_to_peer is None else f"{row.loss_to_peer:.3f}",
            row.verdict,
        ]
        for row in rows
    ]
    text_of = f"Calibrated on {subject.calibrated_on} ({subject.samples} x {subject.length} tokens at most), judged on "
    notes = [f"- {reason}" for reason in _changes(rows)]
    return "\n".join([f"## {subject.name}\n", f"{text_of}{subject.judged_on}.\n", table(head, lines), "", *notes, ""])


def _changes(rows: Sequence[Row]) -> list[str]:
    """What our runs did otherwise than asked, each once, with the number of sites."""
    said: dict[str, None] = {}
    for row in rows:
        for kind in ("changed", "kept"):
            reasons = list(row.notes.get(kind, {}).values())
            said.update({f"{row.scheme}, {reasons.count(reason)} sites: {reason}": None for reason in reasons})
        for site, notes in row.notes.get("fallbacks", {}).items():
            said.update({f"{row.scheme} {row.solver}, {site}: {'; '.join(notes)}": None})
    return list(said)


def _shown(name: str, reference: dict[str, float]) -> str:
    return f"{name} (float {reference[name]:.4f})" if name in reference else name


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description="Make the quality table.")
    parser.add_argument(
        "--models", default=",".join(SUBJECTS), help="which, with commas between (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="4 and 2 bits, little text, no peer: does it all work?")
    parser.add_argument("--schemes", help="only these, with commas between (default: those that fit each model)")
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, help="also run llm-compressor (default: unless --quick)"
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="models and texts not ours")
    parser.add_argument(
        "--out", type=Path, help="JSON to write, .md beside it (default: benchmarks/results/quality.json)"
    )
    arguments = parser.parse_args()
    arguments.models = [name for name in arguments.models.split(",") if name]
    if unknown := sorted(set(arguments.models) - set(SUBJECTS)):
        parser.error(f"--models: {', '.join(unknown)} is none of {', '.join(SUBJECTS)}")
    return arguments


def main() -> None:
    """Measure, print, save."""
    arguments = parse_arguments()
    facts = circumstances("benchmarks.quality")
    has_peer = not arguments.quick if arguments.peers is None else arguments.peers
    peer_absent = llm_compressor.why_not() if has_peer else "left out with --no-peers or --quick"
    rows: list[Row] = []
    sections: list[str] = []
    skipped: dict[str, str] = {} if peer_absent is None else {PEER: peer_absent}
    with tempfile.TemporaryDirectory(dir=cache(), prefix="quality-") as scratch:
        for name in arguments.models:
            note(f"{name}:")
            subject = SUBJECTS[name](arguments.data, Path(scratch), is_quick=arguments.quick)
            if isinstance(subject, str):
                skipped[name] = subject
                note(f"  skipped: {subject}")
                continue
            schemes = _chosen(subject, arguments.schemes, is_quick=arguments.quick)
            found = measure_subject(subject, Path(scratch), schemes, has_peer=peer_absent is None)
            if not found:
                continue
            rows.extend(found)
            sections.append(as_markdown(subject, found))
    notes = [f"- {name}: skipped: {reason}" for name, reason in skipped.items()]
    peer_versions = None if peer_absent else llm_compressor.versions()
    markdown = "\n".join([heading("Quality", facts), *sections, *_legend(peer_versions), *notes, ""])
    save("quality", {**facts, "peer": peer_versions, "skipped": skipped, "rows": rows}, markdown, out=arguments.out)


def _chosen(subject: Subject, asked: str | None, *, is_quick: bool) -> list[str]:
    """The schemes to run: those asked for, of 4 and 2 bits only when it has to be quick."""
    chosen = subject.schemes if asked is None else [name for name in asked.split(",") if name]
    return [name for name in chosen if not is_quick or parse_scheme(name).element.bits in (4, 2)]


def _legend(peer_versions: dict[str, str] | None) -> list[str]:
    lines = [
        "- KL: mean over tokens of KL(original || quantized) in nats; ± se: standard error over windows "
        "(over sentences for 1 - cosine).",
        "- gptq - nearest: mean of the paired differences ± its standard error. nearest uses no data.",
        "- bpw: 8 x bytes of all tensors / weights of the original; embeddings and head are kept in their own type. "
        "of sites: of the quantized weights alone, scales included.",
        "- s, MiB: the whole process from its start, imports included and verification left out; peak resident memory.",
    ]
    if peer_versions:
        numbers = ", ".join(f"{name} {number}" for name, number in peer_versions.items())
        lines.append(f"- {PEER}: {numbers}; same calibration tokens, its own defaults, judged by the same code.")
        lines.append(f"- seconds of {PEER} are those of when it was run: its results are kept.")
    return lines


if __name__ == "__main__":
    main()
