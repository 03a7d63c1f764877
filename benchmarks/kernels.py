"""Products with packed weights beside a streaming read and beside the kernels of llama.cpp, ONNX Runtime, OpenVINO and
torch, on two threads.

    python -m benchmarks.kernels [--quick] [--shapes 4096x4096 ...] [--bits 2 3 4 5 6 8] [--tokens 1 8 128 512]
                                 [--rounds 9] [--resume] [--out FILE]

Weights are cold: everybody goes through distinct matrices of several times the last-level cache. All contestants of a
shape and width live in one process (`make kernel-peers`) and take turns, each right after a streaming read; figures are
medians, ratios medians of each round's. The file is written after every shape and width; --resume keeps those that it
has of the same commit. It takes hours; --quick one shape, 4 bits, 1 and 128 tokens: minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.kernel_targets import MANY_TOKENS, OURS, Timed, findings
from benchmarks.processes import CommandError
from benchmarks.results_file import RESULTS, ROOT, circumstances, heading, note, project_environment, save, table

SHAPES = ("4096x4096", "14336x4096", "4096x14336")
BITS = (2, 3, 4, 5, 6, 8)
TOKENS = (1, 8, 128, 512)
ROUNDS = 9
QUICK = {"shapes": SHAPES[:1], "bits": (4,), "tokens": (1, 128), "rounds": 5}
PYTHON = ROOT / ".venvs" / "kernels" / "bin" / "python"
_NOTES = """\
- Each figure is of one product with one weight [out, in]; a share is of the streaming read in the same seconds.
- int8: activations are rounded to 8 bits by whoever multiplies, each time; float32 and bfloat16: they are not.
- A peer counts where it does what ours does: at fewer than 128 tokens weights of the same width with groups as fine,
  from 128 on any int8 kernel of 4 bits, 8 bits or the width; in exact mode activations of the type or wider.
- Ours lie in huge pages where the system has them, and so what is read; peers' lie where the peer puts them.
- bfloat16 weights stand below for comparison; no target is about them.
"""

# (shape, bits, tokens) -> {"figures": [...], "findings": [...]}
Cells = dict[tuple[str, int, int], dict[str, Any]]


def measure_width(
    shape: str, bits: int, tokens: Sequence[int], rounds: int
) -> tuple[Cells, dict[str, str], dict[str, str]]:
    """Cells of all numbers of tokens; contestants that multiply wrongly, by name; versions."""
    command = [PYTHON, "-m", "benchmarks.peers.kernels.run", "--shape", shape, "--bits", bits, "--rounds", rounds,
               "--tokens", *tokens]  # fmt: skip
    words = [str(word) for word in command]
    done = subprocess.run(words, env=project_environment(), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise CommandError(f"{' '.join(words[1:])} ended with {done.returncode}")
    answer = json.loads(done.stdout.decode().strip().splitlines()[-1])
    cells: Cells = {}
    for number, answers in answer["times"].items():
        timed = [Timed(**one) for one in answers]
        found = findings(timed, bits=bits, tokens=int(number))
        cells[shape, bits, int(number)] = {
            "figures": [one.figure() for one in timed],
            "findings": [{**asdict(finding), "is_met": finding.is_met} for finding in found],
        }
    return cells, answer["failures"], answer["versions"]


def targets_table(cells: Cells) -> str:
    """One row for each target, one column for each shape."""
    shapes = _shapes(cells)
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for (shape, bits, tokens), cell in cells.items():
        for finding in cell["findings"]:
            key = (tokens, bits, finding["ours"], finding["against"], finding["needed"])
            other = "" if finding["other"] in finding["against"] else f" ({finding['other']})"
            verdict = "met" if finding["is_met"] else "**missed**"
            rows.setdefault(key, {})[shape] = f"{finding['measured']:.2f}{other} {verdict}"
    body = [
        [ours, str(tokens), against, f"{needed:g}", *(found.get(shape, "") for shape in shapes)]
        for (tokens, _, ours, against, needed), found in sorted(rows.items(), key=lambda row: row[0][:2])
    ]
    return table(["ours", "tokens", "against", "at least", *shapes], body)


def figures_table(cells: Cells, bits: int, tokens: int) -> str:
    """One row for each contestant: speed and share of the read, or operations; microseconds in parentheses."""
    shapes = _shapes(cells)
    rows: dict[str, dict[str, str]] = {}
    for shape in shapes:
        for figure in cells.get((shape, bits, tokens), {"figures": []})["figures"]:
            name = f"**{figure['name']}**" if figure["library"] == OURS else figure["name"]
            rows.setdefault(name, {})[shape] = _speed(figure, shape, tokens)
    said = "GFLOP/s" if tokens >= MANY_TOKENS else "GB/s of the read's GB/s, share"
    head = [f"{bits} bits, {tokens} token{'s' * (tokens > 1)}: {said} (microseconds)", *shapes]
    return table(head, [[name, *(found.get(shape, "") for shape in shapes)] for name, found in rows.items()])


def _speed(figure: Mapping[str, Any], shape: str, tokens: int) -> str:
    microseconds = figure["microseconds"]
    if tokens >= MANY_TOKENS:
        rows, cols = map(int, shape.split("x"))
        return f"{2 * rows * cols * tokens / microseconds / 1e3:.0f} ({microseconds:.0f})"
    speeds = f"{figure['gb_per_s']:.1f} of {figure['read_gb_per_s']:.1f}"
    return f"{speeds}, {100 * figure['share']:.0f} % ({microseconds:.0f})"


def _shapes(cells: Cells) -> list[str]:
    return list(dict.fromkeys(shape for shape, _, _ in cells))


def as_markdown(facts: Mapping[str, Any], cells: Cells, failures: Mapping[str, str]) -> str:
    answers = [finding["is_met"] for cell in cells.values() for finding in cell["findings"]]
    parts = [
        heading("Products with packed weights", facts),
        _NOTES,
        f"{sum(answers)} of {len(answers)} targets met.\n",
        targets_table(cells),
        *(f"\nLeft out: {name}, {why}." for name, why in failures.items()),
    ]
    for bits, tokens in sorted({(bits, tokens) for _, bits, tokens in cells}):
        parts += ["", figures_table(cells, bits, tokens)]
    return "\n".join([*parts, ""])


def kept_cells(path: Path, commit: str) -> tuple[Cells, dict[str, str]]:
    """What the file has of this commit, and its failures."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if content.get("commit") != commit:
        return {}, {}
    cells = {(cell["shape"], cell["bits"], cell["tokens"]): cell for cell in content["cells"]}
    return cells, content["failures"]


def _save(facts: Mapping[str, Any], cells: Cells, failures: Mapping[str, str], out: Path | None) -> None:
    listed = [{"shape": shape, "bits": bits, "tokens": tokens, **cell} for (shape, bits, tokens), cell in cells.items()]
    content = {**facts, "failures": failures, "cells": listed}
    save("kernels", content, as_markdown(facts, cells, failures), out=out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="four times as many of few tokens")
    parser.add_argument("--quick", action="store_true", help="one shape, 4 bits, 1 and 128 tokens")
    parser.add_argument("--resume", action="store_true", help="keep what the file has of this commit")
    parser.add_argument("--out", type=Path, help="JSON to write, .md beside it")
    arguments = parser.parse_args()
    if arguments.quick:
        parser.set_defaults(**QUICK)
        arguments = parser.parse_args()
    if not PYTHON.exists():
        sys.exit("the peers' environment is not there: make kernel-peers")
    facts = circumstances("benchmarks.kernels")
    path = arguments.out or RESULTS / "kernels.json"
    cells, failures = kept_cells(path, facts["commit"]) if arguments.resume else ({}, {})
    for bits in arguments.bits:
        for shape in arguments.shapes:
            tokens = [number for number in arguments.tokens if (shape, bits, number) not in cells]
            if tokens:
                note(f"{shape}, {bits} bits")
                made, wrong, versions = measure_width(shape, bits, tokens, arguments.rounds)
                cells |= made
                failures |= {f"{name} at {shape}": why for name, why in wrong.items()}
                facts["versions"] |= versions
                _save(facts, cells, failures, arguments.out)


if __name__ == "__main__":
    main()
