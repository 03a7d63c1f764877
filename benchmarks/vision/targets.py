"""What is asked of us in the vision benchmark, what was measured, and whether that is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks.vision.contestants import FLOAT_SCHEME, FLOAT_TOOL, MINMAX, OURS, Contestant
from benchmarks.vision.rows import Row
from pennyweight.evaluate.onnx.latency import NOISE

Rows = Mapping[Contestant, Row]


@dataclass(frozen=True)
class Finding:
    """claim, asked, got: for the reader. holds: None where a row that it needs was not measured."""

    claim: str
    asked: str
    got: str
    holds: bool | None


class _Missing(Exception):
    """A row that is needed was not measured or was refused; the message is its name."""


def _figure(rows: Rows, subject: str, scheme: str, tool: str, method: str) -> float:
    contestant = Contestant(subject, scheme, tool, method)
    row = rows.get(contestant)
    if row is None or row.figure is None:
        raise _Missing(str(contestant))
    return row.figure


def _float(rows: Rows, subject: str) -> float:
    return _figure(rows, subject, FLOAT_SCHEME, FLOAT_TOOL, "")


def _ours(rows: Rows, subject: str, scheme: str, method: str) -> float:
    return _figure(rows, subject, scheme, OURS, method)


def _best_minmax(rows: Rows, subject: str, scheme: str) -> float:
    found = [rows.get(Contestant(subject, scheme, *peer)) for peer in MINMAX]
    figures = [row.figure for row in found if row is not None and row.figure is not None]
    if not figures:
        raise _Missing(f"{subject} {scheme} of any peer")
    return max(figures)


@dataclass(frozen=True)
class _Target:
    """`gain` of the rows in points is to be at least `least`."""

    claim: str
    subject: str
    least: float
    gain: Callable[[Rows], float]


def _loses_at_most(claim: str, subject: str, scheme: str, method: str, points: float) -> _Target:
    def gain(rows: Rows) -> float:
        return _ours(rows, subject, scheme, method) - _float(rows, subject)

    return _Target(claim, subject, -points, gain)


def _gains(claim: str, subject: str, ours: tuple[str, str], other: tuple[str, str], points: float) -> _Target:
    """Both (scheme, method) of ours."""

    def gain(rows: Rows) -> float:
        return _ours(rows, subject, *ours) - _ours(rows, subject, *other)

    return _Target(claim, subject, points, gain)


def _beats_minmax(claim: str, subject: str, scheme: str, points: float) -> _Target:
    def gain(rows: Rows) -> float:
        return _ours(rows, subject, scheme, "ptq") - _best_minmax(rows, subject, scheme)

    return _Target(claim, subject, points, gain)


# Without equalization the spread network is to lose so much that nobody would use it.
_COLLAPSE = 10.0


def _collapse(rows: Rows) -> float:
    return _float(rows, "resnet20-spread") - _ours(rows, "resnet20-spread", "w8a8-tensor", "minmax")


_TARGETS = (
    _loses_at_most("W8A8 PTQ less float", "resnet20", "w8a8-channel", "ptq", 0.3),
    _beats_minmax("W4A8 PTQ less the best peer's min-max", "resnet20", "w4a8-channel", 2.0),
    _loses_at_most("W4A8 PTQ less float", "resnet20", "w4a8-channel", "ptq", 1.0),
    _loses_at_most("W4 QAT less float", "resnet20", "w4-channel", "qat", 0.0),
    _gains("W2 QAT less W2 PTQ", "resnet20", ("w2-channel", "qat"), ("w2-channel", "ptq"), 5.0),
    _Target("float less per-tensor W8A8, min-max, without equalization", "resnet20-spread", _COLLAPSE, _collapse),
    _loses_at_most(
        "the same with equalization less float", "resnet20-spread", "w8a8-tensor", "minmax-equalized", 1.0
    ),
    _loses_at_most("per-tensor W8A8 PTQ less float", "resnet20-spread", "w8a8-tensor", "ptq", 1.0),
    _gains(
        "W4 PTQ less nearest, min-max", "mobilenetv2", ("w4-channel", "ptq"), ("w4-channel", "nearest"), 15.0
    ),
    _gains("W4A8 PTQ less W4 PTQ", "mobilenetv2", ("w4a8-channel", "ptq"), ("w4-channel", "ptq"), -3.0),
    _loses_at_most("int8 weights less float", "minilm", "w8-g128", "ptq", 0.5),
    _loses_at_most("int4 weights less float", "minilm", "w4-g32", "ptq", 0.5),
    _loses_at_most("W8A8 less float", "minilm", "w8a8-channel", "ptq", 0.5),
)  # fmt: skip


def findings(rows: Rows) -> list[Finding]:
    """Every target of a network that was measured, and of every slower file whether its record says so."""
    subjects = {contestant.subject for contestant in rows}
    found = [_finding(target, rows) for target in _TARGETS if target.subject in subjects]
    return [*found, *_exact(rows), *_warned(rows)]


def _finding(target: _Target, rows: Rows) -> Finding:
    claim, asked = f"{target.subject}: {target.claim}", f"at least {target.least:+.1f} points"
    try:
        gain = target.gain(rows)
    except _Missing as missing:
        return Finding(claim, asked, f"not measured: {missing}", None)
    # Shares of pictures are whole numbers: what is equal is not to miss by a rounding of float64.
    return Finding(claim, asked, f"{gain:+.2f}", round(gain, 6) >= target.least)


def _exact(rows: Rows) -> Iterator[Finding]:
    """Of the networks whose activations are static: outputs of ONNX Runtime beside those of our simulation of it."""
    for contestant, row in rows.items():
        counted = row.record.get("integers")
        if counted is not None:
            got = f"{counted['mismatches']:,} of {counted['outputs']:,}, {counted['layers_that_differ']} of "
            got += f"{counted['layers']} layers"
            yield Finding(f"{contestant}", "no output that differs from our integers", got, not counted["mismatches"])


def _warned(rows: Rows) -> Iterator[Finding]:
    for contestant, row in rows.items():
        slower = [latency.ratio for latency in row.latency.values() if latency.ratio > 1 + NOISE]
        if contestant.is_ours and slower:
            warned = any("slower" in str(warning) for warning in row.record.get("warnings", ()))
            times = f"{max(slower):.2f} x float's time, {'warned' if warned else 'no warning'}"
            yield Finding(f"{contestant}", "a warning where the file is slower", times, warned)
