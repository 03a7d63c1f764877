"""The markdown of the vision benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.results_file import table
from benchmarks.vision.contestants import OURS
from benchmarks.vision.latency import THREADS
from benchmarks.vision.rows import Row
from benchmarks.vision.targets import Finding

_MESSAGE = 240
_LEGEND = """\
- less float: the difference in points ± its standard error over the same pictures.
- bytes: of the ONNX file; none where a tool writes none (torchao; NNCF in torch), whose own graph was judged instead.
- ms, x float: one input in ONNX Runtime, medians of one interleaved run of all files; the ratio is to the float file
  in the same round.
- s: the whole process, imports and judging included, on a machine that may have been busy; peers' are kept with what
  they made.
- Everybody gets the same calibration inputs; who trains, the same pictures, shifted and mirrored. ONNX Runtime: uint8
  activations, int8 or int4 weights, its preprocessing, its defaults otherwise. NNCF fast, accurate: with fast and with
  full bias correction; torch-: in torch, as its ONNX backend has no 4 bits. torchao: X86InductorQuantizer, per channel,
  fewer bits by a smaller range of codes; trained: 10 epochs of SGD from 0.01, momentum 0.9, cosine.
- pennyweight nearest: scales from the largest weight, rounded to nearest; ptq: effort normal.
"""


def summary(found: Sequence[Finding]) -> str:
    """What is asked, what was measured, the verdict."""
    if not found:
        return ""
    held = sum(finding.holds is True for finding in found)
    words = {True: "yes", False: "**NO**", None: "**not measured**"}
    lines = [[finding.claim, finding.asked, finding.got, words[finding.holds]] for finding in found]
    head = ["of", "asked", "got", "holds"]
    return "\n".join([f"## Targets: {held} of {len(found)} hold\n", table(head, lines), ""])


def section(name: str, figure: str, about: str, rows: Sequence[Row]) -> str:
    """The table of one network, and the refusals beneath it."""
    beside = list(dict.fromkeys(key for row in rows for key in row.other))
    head = ["scheme", "tool", "method", f"{figure} %", "less float", *beside, "bytes", "x float's", "s"]
    for threads in THREADS:
        head += [f"ms, {threads} thread{'s' * (threads > 1)}", "x float"]
    whole = next((row.size_bytes for row in rows if row.tool == "float"), None)
    lines = [_line(row, beside, whole) for row in rows if row.refused is None]
    refusals = [f"- {row.scheme}, {row.tool} {row.method}: {_shortened(row.refused)}" for row in rows if row.refused]
    if refusals:
        refusals = ["No result:", "", *refusals, ""]
    return "\n".join([f"## {name}\n", f"{about[:1].upper()}{about[1:]}.\n", table(head, lines), "", *refusals])


def _shortened(message: str) -> str:
    """Messages of runtimes hold whole signatures; the .json has all of it."""
    return message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]} ..."


def _line(row: Row, beside: Sequence[str], whole: int | None) -> list[str]:
    assert row.figure is not None
    assert row.difference is not None
    error = "" if row.error is None else f" ± {row.error:.2f}"
    name = f"**{row.tool}**" if row.tool == OURS else row.tool
    size = ["", ""] if row.size_bytes is None else [f"{row.size_bytes:,}", f"{row.size_bytes / (whole or 1):.3f}"]
    line = [row.scheme, name, row.method, f"{row.figure:.2f}", f"{row.difference:+.2f}{error}"]
    line += [f"{row.other[key]:.3g}" if key in row.other else "" for key in beside]
    line += [*size, "" if row.seconds is None else f"{row.seconds:.1f}"]
    for threads in THREADS:
        latency = row.latency.get(threads)
        line += ["", ""] if latency is None else [f"{latency.milliseconds:.3g}", f"{latency.ratio:.2f}"]
    return line


def legend(versions: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What the columns mean, and which versions the peers have."""
    return [
        _LEGEND.rstrip(),
        *(
            f"- {tool}: {', '.join(f'{name} {number}' for name, number in those.items())}"
            for tool, those in versions.items()
        ),
    ]
