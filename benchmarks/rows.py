"""Making one row of the quality table: quantize in a process of its own, measured whole, and judge what it made."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.judges import Score
from benchmarks.peer_tools import PEERS, Peer
from benchmarks.processes import CommandError, measure
from benchmarks.recipes import OURS, Recipe, Setting
from benchmarks.results_file import project_environment
from benchmarks.subjects import Subject
from pennyweight.models import text
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.windows import windows_of


@dataclass
class Row:
    """One artefact, or why there is none (`refused`).

    versus_baseline  mean and standard error of this loss less that of the setting's baseline, over the same windows
    ratios           this loss / that of each peer at the same setting and width
    verdict          what is claimed of this row, and whether it holds
    """

    model: str
    setting: str
    width: str
    tool: str
    recipe: str
    scheme: str
    loss: float | None = None
    loss_stderr: float | None = None
    bpw: float | None = None
    bpw_sites: float | None = None
    other: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    tokens_sha256: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    versus_baseline: tuple[float, float] | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    verdict: str = ""


@dataclass(frozen=True)
class Tokens:
    """Files of calibration windows for the peers.

    path    the windows that our pipeline draws, and `sha256`, their hash
    even    as much of the same text in windows of one length, the mean of ours, for peers that take no others
    """

    path: Path
    sha256: str
    even: Path

    def of(self, peer: Peer) -> Path:
        return self.path if peer.takes_lengths else self.even


def calibration_tokens(subject: Subject, work: Path) -> Tokens:
    """Write the windows of `subject` into `work`."""
    model = StreamedModel(subject.path)
    windows = windows_of(model, subject.calibration, length=subject.length, count=subject.samples)
    path, even = (work / f"{subject.name}-{what}.safetensors" for what in ("tokens", "even-tokens"))
    digest = _save(path, windows)
    if model.is_decoder:
        return Tokens(path, digest, path)
    tokenizer = text.load_tokenizer(subject.path)
    documents, tokens = text.documents(subject.calibration, tokenizer), sum(map(len, windows))
    length = round(tokens / len(windows))
    _save(even, list(text.windows(documents, tokenizer, length=length, count=tokens // length, seed=0)))
    return Tokens(path, digest, even)


def _save(path: Path, windows: Sequence[Tensor]) -> str:
    """Write `windows` as the runners of peers read them; their hash."""
    digest, lengths = text.digest(windows), [len(window) for window in windows]
    if len(set(lengths)) == 1:
        tensors = {"input_ids": torch.stack(list(windows))}
    else:
        tensors = {"input_ids": torch.cat(list(windows)), "lengths": torch.tensor(lengths)}
    save_file(tensors, path, metadata={"sha256": digest})
    return digest


def make_row(
    subject: Subject, setting: Setting, width: str, recipe: Recipe, *, work: Path, tokens: Tokens
) -> tuple[Row, Score | None]:
    """Quantize and judge; a refusal gives a row without figures and no score."""
    row = Row(subject.name, setting.name, width, recipe.tool, recipe.name, setting.scheme(width, recipe))
    row.tokens_sha256 = tokens.sha256 if recipe.needs_data else None
    make = _ours if recipe.tool == OURS else _peers
    return row, make(row, subject, recipe, work=work, tokens=tokens, is_dense=setting.is_dense)


def _ours(row: Row, subject: Subject, recipe: Recipe, *, work: Path, tokens: Tokens, is_dense: bool) -> Score | None:
    out = work / "artefact"
    program = ["benchmarks.ours"] if is_dense else ["pennyweight.cli.main", "quantize"]
    command = [sys.executable, "-m", *program, subject.path, "--out", out, "--scheme", row.scheme, *recipe.options]
    if not is_dense:
        command += ["--verify", "none", "--json"]
    if recipe.needs_data:
        command += ["--calibration", subject.calibration, "--seed", "0"]
        command += ["--samples", str(subject.samples), "--length", str(subject.length)]
    try:
        done = measure(command, environment=project_environment())
    except CommandError as error:
        row.refused = str(error).strip().splitlines()[-1]
        return None
    said = json.loads(done.stdout)
    row.notes = {name: said[name] for name in ("sites", "kept", "changed", "fallbacks")}
    if recipe.needs_data:
        _check_windows(out, subject, tokens)
    score = subject.judge.score(out)
    shutil.rmtree(out)
    _fill(row, score, done)
    return score


def _check_windows(out: Path, subject: Subject, given: Tokens) -> None:
    used = json.loads((out / "pennyweight.json").read_text(encoding="utf-8"))["recipe"]["calibration"]
    if used["tokens_sha256"] != given.sha256:
        raise RuntimeError(f"{subject.name}: the pipeline drew other calibration windows than the peers are given")


def _peers(row: Row, subject: Subject, recipe: Recipe, *, work: Path, tokens: Tokens, is_dense: bool) -> Score | None:
    peer = PEERS[recipe.tool]
    given = tokens.of(peer) if recipe.needs_data else None
    done = peer.quantized(subject.path, scheme=row.scheme, solver=recipe.name, tokens=given)
    row.notes = {name: value for name, value in done.said.items() if name != "refused"}
    row.refused = done.said.get("refused")
    if row.refused is not None:
        return None
    score = subject.judge.score(done.artefact)
    _fill(row, score, done)
    return score


def _fill(row: Row, score: Score, took: Any) -> None:
    row.loss, row.loss_stderr = score.mean_and_error
    row.bpw, row.bpw_sites = round(score.sizes.bpw, 4), round(score.sizes.bpw_sites, 4)
    row.other = score.other
    row.seconds, row.cpu_seconds = round(took.seconds, 2), round(took.cpu_seconds, 2)
    row.peak_memory_bytes = took.peak_memory_bytes
