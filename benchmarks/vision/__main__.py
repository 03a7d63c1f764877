"""Quantized vision networks and a sentence encoder as ONNX files: accuracy, size and latency beside the tools that
people use today.

    python -m benchmarks.vision [--only "resnet20 w4a8-channel"] [--tools pennyweight,nncf] [--quick] [--rounds 9]
                                [--data DIR] [--out FILE]

Each contestant of `contestants.py` is a process of its own with the same inputs (`subjects.py`); what it made is kept
in benchmarks/.cache by content. All files of a network then take turns in ONNX Runtime. `targets.py` holds what is
asked of us; the result begins with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results_file import ROOT, circumstances, heading, note, save
from benchmarks.vision import tables
from benchmarks.vision.artefacts import PEERS, made, why_not
from benchmarks.vision.contestants import (
    FLOAT_SCHEME,
    FLOAT_TOOL,
    OURS,
    QUICK,
    SLOW_METHODS,
    Contestant,
    contestants,
)
from benchmarks.vision.latency import THREADS, latencies
from benchmarks.vision.rows import Row, float_score, judged, row_of
from benchmarks.vision.subjects import SUBJECTS, Subject
from benchmarks.vision.targets import Finding, findings

TOOLS = (OURS, *PEERS)
_ROUNDS, _QUICK_ROUNDS = 9, 3


@dataclass
class Results:
    """What goes into the result, in the order of the networks; `skipped`: tool or network -> why it is not there."""

    skipped: dict[str, str] = field(default_factory=dict)
    rows: dict[Contestant, Row] = field(default_factory=dict)
    sections: list[str] = field(default_factory=list)

    def targets(self) -> list[Finding]:
        return findings(self.rows)


def measure_subject(subject: Subject, chosen: Sequence[Contestant], rounds: int) -> dict[Contestant, Row]:
    """The rows of one network, the float one first."""
    original = Contestant(subject.name, FLOAT_SCHEME, FLOAT_TOOL, "")
    first = Row(subject.name, FLOAT_SCHEME, FLOAT_TOOL, "", size_bytes=subject.problem.float_file.stat().st_size)
    judged(first, float_score(subject), float_score(subject))
    rows, files = {original: first}, {str(original): subject.problem.float_file}
    for contestant in chosen:
        artefact = made(contestant, subject.problem)
        rows[contestant], _ = row_of(contestant, artefact, subject)
        if artefact.refused is None and artefact.file is not None:
            files[str(contestant)] = artefact.file
        note(f"  {_short(rows[contestant])}")
    one = {name: values[:1] for name, values in subject.problem.arrays("judged").items()}
    for threads in THREADS if rounds else ():
        found = latencies(files, one, threads=threads, rounds=rounds, reference=str(original))
        for contestant, row in rows.items():
            if str(contestant) in found:
                row.latency[threads] = found[str(contestant)]
    return rows


def _short(row: Row) -> str:
    result = f"refused: {row.refused}" if row.figure is None else f"{row.figure:.2f} ({row.difference:+.2f})"
    return f"{row.scheme} {row.tool} {row.method}: {result}, {row.seconds:.1f} s"


def measure_all(arguments: argparse.Namespace) -> Results:
    """Measure every contestant that was asked for and can be run."""
    results = Results({tool: reason for tool in arguments.tools if (reason := why_not(tool))})
    if arguments.quick:
        results.skipped |= {f"all of {' and '.join(SLOW_METHODS)}": "left out by --quick"}
    asked = [one for one in contestants() if _is_asked(one, arguments) and one.tool not in results.skipped]
    for name in dict.fromkeys(one.subject for one in asked):
        note(f"{name}:")
        subject = SUBJECTS[name](arguments.data)
        if isinstance(subject, str):
            results.skipped[name] = subject
            note(f"  skipped: {subject}")
            continue
        rows = measure_subject(subject, [one for one in asked if one.subject == name], arguments.rounds)
        results.rows |= rows
        results.sections.append(tables.section(name, subject.judge.figure, subject.about, list(rows.values())))
    return results


def _is_asked(contestant: Contestant, arguments: argparse.Namespace) -> bool:
    if contestant.tool not in arguments.tools or (arguments.quick and contestant.method in SLOW_METHODS):
        return False
    return not arguments.only or any(_matches(contestant, words) for words in arguments.only)


def _matches(contestant: Contestant, words: str) -> bool:
    """Whether each word is one of the contestant's four."""
    return set(words.split()) <= set(str(contestant).split())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description="Networks as ONNX files.")
    parser.add_argument(
        "--only", nargs="+", help='rows that have all words of one of these: "resnet20 w4a8-channel" "minilm ptq"'
    )
    parser.add_argument("--tools", default=",".join(TOOLS), help="with commas between (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="ResNet-20 in W8A8 and W4A8, nothing that trains")
    parser.add_argument("--rounds", type=int, help=f"of latencies; 0 leaves them out (default: {_ROUNDS})")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="models and data not ours")
    parser.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/vision.json)")
    arguments = parser.parse_args()
    arguments.tools = [tool for tool in arguments.tools.split(",") if tool]
    if unknown := sorted(set(arguments.tools) - set(TOOLS)):
        parser.error(f"--tools: {', '.join(unknown)} is none of {', '.join(TOOLS)}")
    arguments.only = arguments.only or (QUICK if arguments.quick else ())
    if arguments.rounds is None:
        arguments.rounds = _QUICK_ROUNDS if arguments.quick else _ROUNDS
    return arguments


def main() -> None:
    """Measure, print, save."""
    arguments = parse_arguments()
    facts: dict[str, Any] = circumstances("benchmarks.vision")
    results = measure_all(arguments)
    versions = {tool: PEERS[tool].versions() for tool in PEERS if tool in arguments.tools and not why_not(tool)}
    notes = [f"- {name}: skipped: {reason}" for name, reason in results.skipped.items()]
    targets = results.targets()
    parts = [heading("Vision", facts), tables.summary(targets), *results.sections, *tables.legend(versions), *notes, ""]
    content = {**facts, "peers": versions, "skipped": results.skipped, "targets": targets}
    save("vision", content | {"rows": list(results.rows.values())}, "\n".join(parts), out=arguments.out)


if __name__ == "__main__":
    main()
