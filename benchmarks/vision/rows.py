"""One line of the tables of the vision benchmark: what a contestant made, judged beside the float network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.vision.artefacts import Artefact
from benchmarks.vision.contestants import Contestant
from benchmarks.vision.judges import Score, paired
from benchmarks.vision.latency import Latency
from benchmarks.vision.subjects import Subject


@dataclass
class Row:
    """figure, other       of the subject's judge; None where there is no result, and `refused` says why
    difference, error   figure less that of the float network in points, and its standard error over the same pictures
    size_bytes          of the ONNX file; None where the tool writes none
    seconds             of the whole process, imports and judging included
    latency             by number of threads
    record              what our run record says
    """

    subject: str
    scheme: str
    tool: str
    method: str
    figure: float | None = None
    difference: float | None = None
    error: float | None = None
    other: Mapping[str, float] = field(default_factory=dict)
    size_bytes: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    latency: dict[int, Latency] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None


def row_of(contestant: Contestant, artefact: Artefact, subject: Subject) -> tuple[Row, Score | None]:
    """The line of `contestant`, and its score if it has one."""
    row = Row(contestant.subject, contestant.scheme, contestant.tool, contestant.method)
    row.seconds, row.cpu_seconds = round(artefact.seconds, 1), round(artefact.cpu_seconds, 1)
    row.peak_memory_bytes = artefact.peak_memory_bytes
    row.refused = artefact.refused
    row.record = artefact.said.get("record", {})
    if row.refused is not None:
        return row, None
    score = subject.judge.score(artefact.outputs(), subject.of_float)
    judged(row, score, float_score(subject))
    row.size_bytes = artefact.size_bytes
    return row, score


def float_score(subject: Subject) -> Score:
    """Of the float network itself."""
    return subject.judge.score(subject.of_float, subject.of_float)


def judged(row: Row, score: Score, of_float: Score) -> None:
    """Fill in what the judge found."""
    row.figure, row.other = score.figure, score.other
    row.difference, row.error = paired(score, of_float)
