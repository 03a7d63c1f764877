"""Time and memory of the main job on a synthetic Llama of up to 1.1 B weights, beside llm-compressor.

    python -m benchmarks.speed [--blocks 4 8 22] [--ours-only] [--repeats 3] [--gptq-repeats 1] [--checkpoints DIR]

Two jobs, both int4-g128: `nearest` (min-max scales, no data) and `gptq` (8 x 512 calibration tokens, the same for both
tools). Each run is a process of its own, measured from its start to its end: imports are included, our verification is
left out. Ours is run at every number of blocks, the peer at the largest, in turn (ours, peer, ours, peer); figures are
medians. Before each run the checkpoint is read once and unwritten pages are flushed, so that the page cache is alike.
This process stays small and imports no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer_tools import LLM_COMPRESSOR
from benchmarks.processes import CommandError, Measured, measure
from benchmarks.results_file import ROOT, cache, circumstances, heading, mib, note, project_environment, save, table

OURS, PEER = "pennyweight", "llm-compressor"
SCHEME = "int4-g128"
SAMPLES, LENGTH = 8, 512
# The checkpoint's tokenizer gives one token a byte: this file of 11 kB is more than enough text.
TEXT = ROOT / "LICENSE"
# What our command is given of it.
CALIBRATED = ("--calibration", TEXT, "--samples", str(SAMPLES), "--length", str(LENGTH), "--seed", "0")
# The size for which the requirements are stated: 1.1 B weights.
FULL_BLOCKS = 22
# Seconds and peak memory as parts of the peer's; None: no such limit. Bytes at most: ours alone.
SHARES = {"nearest": (1 / 3, 1 / 3), "gptq": (1 / 4, None)}
LARGEST_GPTQ_BYTES = 1.6e9
# Peak memory at the largest number of blocks over that at the smallest: tables and journal may grow, weights may not.
LARGEST_GROWTH = 1.05
_WINDOWS = """
import sys
from safetensors.torch import save_file
from pennyweight.models import text
model, source, out, count, length = sys.argv[1:]
tokenizer = text.load_tokenizer(__import__("pathlib").Path(model))
documents = text.documents(source, tokenizer)
windows = text.windows(documents, tokenizer, length=int(length), count=int(count), seed=0)
save_file({"input_ids": windows.contiguous()}, out)
print(text.digest(windows))
"""


@dataclass(frozen=True)
class Run:
    """One measured process; `load` is the machine's load average just before it."""

    job: str
    tool: str
    blocks: int
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    load: float


@dataclass(frozen=True)
class Figure:
    """Medians of the runs of one job, tool and number of blocks; fastest and slowest beside them."""

    job: str
    tool: str
    blocks: int
    runs: int
    seconds: float
    fastest: float
    slowest: float
    cpu_seconds: float
    peak_memory_bytes: float


class Bench:
    """Runs jobs on the checkpoints below `checkpoints`, writing into `work`."""

    def __init__(self, checkpoints: Path, work: Path) -> None:
        self._checkpoints = checkpoints
        self._work = work
        self.tokens_sha256: str | None = None

    def checkpoint(self, blocks: int) -> Path:
        """The synthetic checkpoint with `blocks` blocks, made if it is not there."""
        path = self._checkpoints / str(blocks)
        if not (path / "config.json").exists():
            note(f"making the checkpoint of {blocks} blocks")
            partial = path.with_name(f"{blocks}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            measure([sys.executable, "-m", "benchmarks.synthetic", partial, "--blocks", str(blocks)],
                    environment=project_environment())  # fmt: skip
            partial.rename(path)
        return path

    def run(self, job: str, tool: str, blocks: int) -> Run:
        """One run from a page cache that holds the checkpoint."""
        model, out = self.checkpoint(blocks), self._work / "out"
        tokens = self.tokens(model) if job == "gptq" else None
        read_all(model)
        os.sync()
        load = round(os.getloadavg()[0], 2)
        done = self._ours(job, model, out) if tool == OURS else _peer(job, model, out, tokens)
        shutil.rmtree(out)
        run = Run(job, tool, blocks, done.seconds, done.cpu_seconds, done.peak_memory_bytes, load)
        note(f"  {job} {tool} {blocks} blocks: {run.seconds:.1f} s, {mib(run.peak_memory_bytes)} MiB")
        return run

    def _ours(self, job: str, model: Path, out: Path) -> Measured:
        asked = ["--fit", "minmax"] if job == "nearest" else CALIBRATED
        done = ours(model, out, "--solver", job, *asked)
        calibration = json.loads((out / "pennyweight.json").read_text(encoding="utf-8"))["recipe"]["calibration"]
        if job == "gptq" and calibration["tokens_sha256"] != self.tokens_sha256:
            raise CommandError("our run drew other calibration windows than the peer is given")
        return done

    def tokens(self, model: Path) -> Path:
        """The calibration windows that our own run will draw, in a file for the peer."""
        path = self._work / "tokens.safetensors"
        if self.tokens_sha256 is None:
            command = [sys.executable, "-c", _WINDOWS, model, TEXT, path, str(SAMPLES), str(LENGTH)]
            self.tokens_sha256 = measure(command, environment=project_environment()).stdout.strip()
        return path


def ours(model: Path, out: Path, *options: object) -> Measured:
    """A run of our command, unverified."""
    command = [sys.executable, "-m", "pennyweight.cli.main", "quantize", model, "--out", out, "--json"]
    return measure([*command, "--scheme", SCHEME, "--verify", "none", *options], environment=project_environment())


def _peer(job: str, model: Path, out: Path, tokens: Path | None) -> Measured:
    return LLM_COMPRESSOR.run(model, out, scheme=SCHEME, solver=job, tokens=tokens)


def read_all(model: Path) -> None:
    """Bring the files of `model` into the page cache."""
    buffer = bytearray(1 << 22)
    for path in model.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def schedule(blocks: Sequence[int], jobs: Sequence[str], repeats: dict[str, int], *, has_peer: bool) -> Iterator[
    tuple[str, str, int]
]:  # fmt: skip
    """(job, tool, blocks) in the order of the runs: at the largest model ours and the peer's take turns."""
    for job in jobs:
        for count in sorted(blocks):
            tools = [OURS, PEER] if has_peer and count == max(blocks) else [OURS]
            for _ in range(repeats[job]):
                yield from ((job, tool, count) for tool in tools)


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Medians, in the order in which the kinds of run came."""
    groups: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.job, run.tool, run.blocks), []).append(run)
    return [_figure(*key, group) for key, group in groups.items()]


def _figure(job: str, tool: str, blocks: int, runs: list[Run]) -> Figure:
    seconds = [run.seconds for run in runs]
    return Figure(
        job=job,
        tool=tool,
        blocks=blocks,
        runs=len(runs),
        seconds=statistics.median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        cpu_seconds=statistics.median(run.cpu_seconds for run in runs),
        peak_memory_bytes=statistics.median(run.peak_memory_bytes for run in runs),
    )


@dataclass(frozen=True)
class Claim:
    """A figure that says something, and the largest that is allowed where there is a requirement."""

    what: str
    measured: float
    limit: float | None

    @property
    def holds(self) -> bool | None:
        return None if self.limit is None else self.measured <= self.limit


def claims(found: Sequence[Figure]) -> list[Claim]:
    """What of the requirements these figures can answer."""
    at = {(figure.job, figure.tool, figure.blocks): figure for figure in found}
    made: list[Claim] = []
    for (job, tool, blocks), ours in at.items():
        peer = at.get((job, PEER, blocks))
        if tool == OURS and peer is not None:
            for name, share, limit in zip(("seconds", "peak memory"), _shares(ours, peer), SHARES[job], strict=True):
                limit = limit if blocks >= FULL_BLOCKS else None
                made.append(Claim(f"{job}, {blocks} blocks: {name} / peer's", share, limit))
        if tool == OURS and job == "gptq":
            made.append(Claim(f"gptq, {blocks} blocks: peak memory in GB", ours.peak_memory_bytes / 1e9,
                              LARGEST_GPTQ_BYTES / 1e9))  # fmt: skip
    for job in dict.fromkeys(figure.job for figure in found):
        sizes = {
            figure.blocks: figure.peak_memory_bytes for figure in found if (figure.job, figure.tool) == (job, OURS)
        }
        if len(sizes) > 1:
            what = f"{job}: peak memory at {max(sizes)} blocks / at {min(sizes)}"
            made.append(Claim(what, sizes[max(sizes)] / sizes[min(sizes)], LARGEST_GROWTH))
    return made


def _shares(ours: Figure, peer: Figure) -> tuple[float, float]:
    return ours.seconds / peer.seconds, ours.peak_memory_bytes / peer.peak_memory_bytes


def as_markdown(found: Sequence[Figure], made: Sequence[Claim]) -> str:
    """The two tables."""
    head = ["job", "tool", "blocks", "runs", "seconds", "fastest - slowest", "processor s", "peak MiB"]
    rows = [
        [figure.job, figure.tool, str(figure.blocks), str(figure.runs), f"{figure.seconds:.1f}",
         f"{figure.fastest:.1f} - {figure.slowest:.1f}", f"{figure.cpu_seconds:.1f}", mib(figure.peak_memory_bytes)]
        for figure in found
    ]  # fmt: skip
    answers = {True: "yes", False: "**NO**", None: ""}
    checks = [
        [claim.what, f"{claim.measured:.3f}", "" if claim.limit is None else f"{claim.limit:.3f}", answers[claim.holds]]
        for claim in made
    ]
    return f"{table(head, rows)}\n\n{table(['claim', 'measured', 'at most', 'holds'], checks)}\n"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="Measure time and memory.")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 22], help="sizes (default: 4 8 22)")
    parser.add_argument("--jobs", nargs="+", choices=tuple(SHARES), default=list(SHARES), help="(default: both)")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="also run llm-compressor")
    parser.add_argument("--ours-only", dest="peer", action="store_false", help="the same as --no-peer")
    parser.add_argument("--repeats", type=int, default=3, help="runs of nearest (default: %(default)s)")
    parser.add_argument("--gptq-repeats", type=int, default=1, help="runs of gptq (default: %(default)s)")
    parser.add_argument("--checkpoints", type=Path, help="where they are kept (default: benchmarks/.cache/synthetic)")
    parser.add_argument(
        "--out", type=Path, help="JSON to write, .md beside it (default: benchmarks/results/speed.json)"
    )
    arguments = parser.parse_args()
    if min(arguments.blocks) < 1 or min(arguments.repeats, arguments.gptq_repeats) < 1:
        parser.error("--blocks and repeats are at least 1")
    return arguments


def main() -> None:
    """Measure, print, save; what has been measured is saved even where a later run fails."""
    arguments = parse_arguments()
    facts = circumstances("benchmarks.speed")
    peer_absent = LLM_COMPRESSOR.why_not() if arguments.peer else "left out with --ours-only"
    repeats = {"nearest": arguments.repeats, "gptq": arguments.gptq_repeats}
    checkpoints = arguments.checkpoints or cache("synthetic")
    checkpoints.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(dir=cache(), prefix="speed-") as work:
        bench = Bench(checkpoints, Path(work))
        try:
            for job, tool, blocks in schedule(arguments.blocks, arguments.jobs, repeats, has_peer=peer_absent is None):
                runs.append(bench.run(job, tool, blocks))
        finally:
            if runs:
                _save(facts, runs, bench.tokens_sha256, peer_absent, arguments.out)


def _save(
    facts: dict[str, Any], runs: Sequence[Run], tokens_sha256: str | None, peer_absent: str | None, out: Path | None
) -> None:
    found = figures(runs)
    made = claims(found)
    peer = {"absent": peer_absent} if peer_absent else LLM_COMPRESSOR.versions()
    content = {
        **facts,
        "peer": peer,
        "scheme": SCHEME,
        "tokens": {"samples": SAMPLES, "length": LENGTH, "sha256": tokens_sha256},
        "figures": found,
        "claims": [{**asdict(claim), "holds": claim.holds} for claim in made],
        "runs": list(runs),
    }
    numbers = ", ".join(f"{name} {number}" for name, number in peer.items())
    notes = [
        f"- {SCHEME}; nearest: min-max scales, no data; gptq: the same {SAMPLES} x {LENGTH} tokens for both.",
        "- Whole processes, imports included, our verification left out; peak resident memory, mapped files included.",
        f"- {PEER}: {numbers}",
        f"- load average before the runs: {min(run.load for run in runs)} to {max(run.load for run in runs)}",
    ]
    markdown = "\n".join([heading("Time and memory", facts), as_markdown(found, made), *notes, ""])
    save("speed", content, markdown, out=out)


if __name__ == "__main__":
    main()
