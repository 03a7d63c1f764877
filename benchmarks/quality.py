"""The quality table: what every width costs with every recipe of ours, beside the tools that people use today.

    python -m benchmarks.quality [--models demo,stories260K,minilm] [--settings symmetric,asymmetric]
                                 [--widths int4-g128,int3-g128] [--tools pennyweight,auto-round] [--quick]
                                 [--data DIR] [--out FILE]

Every run is a process of its own, measured from start to end. Each artefact is judged window by window against its
original, so that two of them are compared in pairs: differences have a standard error over the same windows. Peers get
the very same calibration tokens and the same bytes (`recipes.SETTINGS`), and their
artefacts are judged by the same code; their results are kept in benchmarks/.cache. Whatever does not take a model or a
scheme stands in the table with its message. `targets.py` holds what is asked of us; the result begins with it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.judges import Score, paired
from benchmarks.peer_tools import AUTO_ROUND, PEERS
from benchmarks.quality_tables import as_markdown, legend, summary
from benchmarks.recipes import OURS, SETTINGS, Recipe, Setting
from benchmarks.results_file import ROOT, cache, circumstances, heading, note, save
from benchmarks.rows import Row, Tokens, calibration_tokens, make_row
from benchmarks.subjects import SUBJECTS, Subject
from benchmarks.targets import TARGET_MODEL, Finding, findings
from pennyweight.schemes import parse_scheme

# "int8 KL under 1e-3"
_LARGEST_LOSS_AT_8_BITS = 1e-3
# Differences count from so many standard errors on.
_ERRORS = 2.0
TOOLS = (OURS, *PEERS)
# What --quick shows.
_QUICK = {"models": "demo", "settings": "symmetric", "widths": "int4-g128"}


@dataclass
class Bench:
    """What is being measured, and what has been found so far."""

    settings: Sequence[str]
    widths: Sequence[str] | None
    absent: dict[str, str]
    is_quick: bool
    work: Path
    scores: dict[tuple[str, str, Recipe], Score] = field(default_factory=dict)

    def measure_subject(self, subject: Subject) -> Iterator[list[Row]]:
        """The rows of one model, width by width in the order of the table, with their verdicts."""
        tokens = calibration_tokens(subject, self.work)
        self.scores.clear()
        for name in self.settings:
            for width in subject.widths.get(name, ()):
                if self.widths is None or width in self.widths:
                    yield self._measure_width(subject, SETTINGS[name], width, tokens)

    def _measure_width(self, subject: Subject, setting: Setting, width: str, tokens: Tokens) -> list[Row]:
        made: dict[Recipe, Row] = {}
        for recipe in self._recipes(subject, setting, width, tokens):
            row, score = make_row(subject, setting, width, recipe, work=self.work, tokens=tokens)
            made[recipe] = row
            if score is not None:
                self.scores[setting.name, width, recipe] = score
            note(f"  {setting.name} {width} {recipe}: {_short(row, subject)}")
        self._compare(setting, width, made)
        return list(made.values())

    def _recipes(self, subject: Subject, setting: Setting, width: str, tokens: Tokens) -> Iterator[Recipe]:
        bits = parse_scheme(width).element.bits
        for recipe in setting.recipes:
            if recipe.tool in self.absent or not recipe.least_bits <= bits <= recipe.most_bits:
                continue
            if recipe.tool == AUTO_ROUND.tool and self.is_quick:
                scheme = setting.scheme(width, recipe)
                if not AUTO_ROUND.is_kept(
                    subject.path, scheme=scheme, solver=recipe.name, tokens=tokens.of(AUTO_ROUND)
                ):
                    note(f"  {setting.name} {width} {recipe}: left out by --quick, as no result of it is kept")
                    continue
            yield recipe

    def _compare(self, setting: Setting, width: str, made: dict[Recipe, Row]) -> None:
        """Fill in the differences, the ratios and the verdicts of one width."""
        scores = {recipe: self.scores[key] for recipe in made if (key := (setting.name, width, recipe)) in self.scores}
        baseline = scores.get(setting.baseline)
        for recipe, score in scores.items():
            row = made[recipe]
            if not recipe.is_ours:
                continue
            if baseline is not None and recipe != setting.baseline:
                row.versus_baseline = paired(score, baseline)
            row.ratios = {
                other.name: score.mean_and_error[0] / theirs.mean_and_error[0]
                for other, theirs in scores.items()
                if not other.is_ours and not made[other].notes.get("left_in_float")
            }
            row.verdict = "; ".join(_verdicts(row, parse_scheme(width).element.bits))


def _short(row: Row, subject: Subject) -> str:
    return row.refused or f"{subject.judge.loss} {row.loss:.3g}, {row.seconds:.0f} s"


def _verdicts(row: Row, bits: int) -> Iterator[str]:
    if bits == 8 and row.loss is not None:
        yield _held(row.loss < _LARGEST_LOSS_AT_8_BITS, "under 1e-3")
    if row.versus_baseline is not None:
        difference, error = row.versus_baseline
        if bits == 8:
            yield _held(difference <= _ERRORS * error, "not above the baseline by > 2 se")
        else:
            yield _held(difference < -_ERRORS * error, "below the baseline by > 2 se")


def _held(is_so: bool, claim: str) -> str:
    return claim if is_so else f"**NOT** {claim}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description="Make the quality table.")
    parser.add_argument("--models", help=f"with commas between (default: {','.join(SUBJECTS)})")
    parser.add_argument("--settings", help=f"with commas between (default: {','.join(SETTINGS)})")
    parser.add_argument("--widths", help="only these: int4-g128,int3-g128 (default: those that fit each model)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the shipped model in int4-g128, symmetric; AutoRound only if a result of it is kept",
    )
    parser.add_argument("--tools", help=f"with commas between (default: {','.join(TOOLS)})")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="models and texts not ours")
    parser.add_argument(
        "--out", type=Path, help="JSON to write, .md beside it (default: benchmarks/results/quality.json)"
    )
    arguments = parser.parse_args()
    for name, known in (("models", SUBJECTS), ("settings", SETTINGS), ("tools", TOOLS), ("widths", None)):
        chosen = getattr(arguments, name) or (_QUICK.get(name) if arguments.quick else None)
        words = list(known or ()) if chosen is None else [word for word in chosen.split(",") if word]
        if known is not None and (unknown := sorted(set(words) - set(known))):
            parser.error(f"--{name}: {', '.join(unknown)} is none of {', '.join(known)}")
        setattr(arguments, name, words or None)
    return arguments


def _left_out(tools: Sequence[str]) -> dict[str, str]:
    """The tools that will not be run, and why."""
    asked = {tool: None if tool in tools else "left out by --tools" for tool in TOOLS}
    reasons = {tool: reason or (PEERS[tool].why_not() if tool in PEERS else None) for tool, reason in asked.items()}
    return {tool: reason for tool, reason in reasons.items() if reason is not None}


@dataclass
class Results:
    """What goes into the result, in the order of the models; `skipped`: tool or model -> why it is not there."""

    skipped: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)
    targets: list[Finding] = field(default_factory=list)

    def save(self, facts: Mapping[str, Any], out: Path | None) -> None:
        versions = {tool: peer.versions() for tool, peer in PEERS.items() if tool not in self.skipped}
        notes = [f"- {name}: skipped: {reason}" for name, reason in self.skipped.items()]
        parts = [heading("Quality", facts), summary(self.targets), *self.sections.values(), *legend(versions), *notes]
        content = {**facts, "peers": versions, "skipped": self.skipped, "targets": self.targets, "rows": self.rows}
        save("quality", content, "\n".join([*parts, ""]), out=out)


def measure_all(arguments: argparse.Namespace, scratch: Path) -> Iterator[Results]:
    """Measure every model that was asked for and is there; what has been found so far, after every width and skip."""
    absent = _left_out(arguments.tools)
    results = Results(dict(absent))
    bench = Bench(arguments.settings, arguments.widths, absent, arguments.quick, scratch)
    for name in arguments.models:
        note(f"{name}:")
        subject = SUBJECTS[name](arguments.data, scratch)
        if isinstance(subject, str):
            results.skipped[name] = subject
            note(f"  skipped: {subject}")
            yield results
            continue
        for rows in bench.measure_subject(subject):
            results.rows += rows
            results.sections[name] = as_markdown(subject, [row for row in results.rows if row.model == subject.name])
            if name == TARGET_MODEL:
                results.targets = findings(bench.scores)
            yield results


def main() -> None:
    """Measure, print, save: after every width, as the whole takes hours."""
    arguments = parse_arguments()
    facts: dict[str, Any] = circumstances("benchmarks.quality")
    with tempfile.TemporaryDirectory(dir=cache(), prefix="quality-") as scratch:
        for results in measure_all(arguments, Path(scratch)):
            results.save(facts, arguments.out)


if __name__ == "__main__":
    main()
