"""The markdown of the quality table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from benchmarks.recipes import SETTINGS, Setting
from benchmarks.results_file import mib, table
from benchmarks.rows import Row
from benchmarks.subjects import Subject
from benchmarks.targets import Finding


def summary(found: Sequence[Finding]) -> str:
    """What is asked of us and what was measured."""
    if not found:
        return ""
    held = sum(finding.holds for finding in found)
    head = ["target", "setting", "asked at most", "measured", "holds", "margin"]
    lines = [_target_line(finding) for finding in found]
    return "\n".join(
        [
            f"## Targets: {held} of {len(found)} hold\n",
            "Ratios of losses on the shipped model. Margin: mean over windows of (asked x other - ours), in its own "
            "standard errors.\n",
            table(head, lines),
            "",
        ]
    )


def _target_line(finding: Finding) -> list[str]:
    target = finding.target
    what = [f"{target.width} {target.ours.name} / {target.other}", target.setting, f"{target.ratio:.2f}"]
    if finding.measured is None or finding.margin is None:
        return [*what, "", "**not measured**", ""]
    mean, error = finding.margin
    margin = f"{-mean / error:+.1f} se" if error else ""
    return [*what, f"{finding.measured:.3f}", "yes" if finding.holds else "**NO**", margin]


def as_markdown(subject: Subject, rows: Sequence[Row]) -> str:
    """The section of one model, with a table for each setting and a part for each width."""
    text_of = f"Calibrated on {subject.calibrated_on} ({subject.samples} x {subject.length} tokens at most), judged on "
    parts = [f"## {subject.name}\n", f"{text_of}{subject.judged_on}.{_reference(subject)}\n"]
    for name, of_setting in groupby(rows, key=lambda row: row.setting):
        parts.append(_setting_section(subject, SETTINGS[name], list(of_setting)))
    return "\n".join(parts)


def _reference(subject: Subject) -> str:
    figures = ", ".join(f"{name} {value:.4f}" for name, value in subject.judge.reference.items())
    return f" The original: {figures}." if figures else ""


def _setting_section(subject: Subject, setting: Setting, rows: Sequence[Row]) -> str:
    beside = list(dict.fromkeys(name for row in rows for name in row.other))
    head = ["width", "tool", "recipe", "bits", f"{subject.judge.loss} ± se", *beside, "s", "MiB"]
    head += [f"less {setting.baseline.name}", "times the peers'", "verdict"]
    lines = [_line(row, beside) for row in rows]
    notes = [f"- {reason}" for reason in _notes(rows)]
    return "\n".join([f"### {subject.name}: {setting.title}\n", table(head, lines), "", *notes, ""])


def _line(row: Row, beside: Sequence[str]) -> list[str]:
    if row.loss is None:
        return [row.width, row.tool, row.recipe, "", "refused", *("" for _ in beside), "", "", "", "", ""]
    return [
        row.width,
        row.tool,
        row.recipe,
        f"{row.bpw_sites:.3f}",
        f"{row.loss:.3g} ± {row.loss_stderr:.1g}",
        *(f"{row.other[name]:.4g}" for name in beside),
        f"{row.seconds:.1f}",
        mib(row.peak_memory_bytes or 0),
        "" if row.versus_baseline is None else f"{row.versus_baseline[0]:+.3g} ± {row.versus_baseline[1]:.1g}",
        ", ".join(f"{ratio:.2f} {name}" for name, ratio in row.ratios.items()),
        row.verdict,
    ]


def _notes(rows: Sequence[Row]) -> list[str]:
    """Refusals, and what our runs did otherwise than asked, each once, with the number of sites."""
    said: dict[str, None] = {}
    for row in rows:
        if row.refused is not None:
            said[f"{row.width}, {row.tool} {row.recipe}: {row.refused}"] = None
        if left := row.notes.get("left_in_float"):
            said[f"{row.width}, {row.tool}: {len(left)} weights left in float, as it does not take their shapes"] = None
        for kind in ("changed", "kept"):
            reasons = list(row.notes.get(kind, {}).values())
            said.update({f"{row.scheme}, {reasons.count(reason)} sites: {reason}": None for reason in reasons})
        for site, notes in row.notes.get("fallbacks", {}).items():
            said.update({f"{row.scheme} {row.recipe}, {site}: {'; '.join(notes)}": None})
    return list(said)


def legend(versions: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What the columns mean, and which versions the peers have."""
    lines = [
        "- KL: mean over tokens of KL(original || quantized) in nats; ± se: standard error over windows "
        "(over sentences for 1 - cosine).",
        "- less nearest: mean of the paired differences ± its standard error.",
        "- times the peers': this loss / that of each peer at the same width and setting, if it quantized all weights.",
        "- bits: of a quantized weight, scales and zero points included; embeddings and head keep their own type.",
        "- s, MiB: the whole process from its start, imports included and verification left out; peak resident memory.",
    ]
    if versions:
        lines.append(
            "- Peers: the same calibration tokens, their own defaults, judged by the same code. Their seconds are of "
            "when they were run: results are kept. AutoRound takes windows of one length alone: where ours are texts "
            "by themselves, its are of their mean length, cut from the same text."
        )
    for tool, numbers in versions.items():
        lines.append(f"- {tool}: {', '.join(f'{name} {number}' for name, number in numbers.items())}")
    return lines
