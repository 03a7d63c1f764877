"""Seconds that a block of the synthetic Llama of 1.1 B weights takes with each effort, beside the peers.

    python -m benchmarks.efforts [--checkpoints DIR] [--efforts fast normal best] [--out FILE]

int4-g128, the same 8 x 512 tokens for all. A block's seconds are the difference of whole runs with 4 and with 2
blocks, over two; what a run takes beside its blocks drops out. AutoRound's are those of its 200 iterations, from the
difference of 15 and 5 on one block: all 200 would take a quarter of an hour. This process imports no torch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peer_tools import AUTO_ROUND, LLM_COMPRESSOR, Peer, said
from benchmarks.processes import measure
from benchmarks.results_file import ROOT, cache, circumstances, heading, note, save, table
from benchmarks.speed import CALIBRATED, FULL_BLOCKS, LENGTH, OURS, SAMPLES, SCHEME, Bench, ours

FEW, MORE = 2, 4
ITERATIONS = (5, 15)
DEFAULT_ITERATIONS = 200
# Ours -> the peer that it is to be no slower than.
LIMITS = {"fast": LLM_COMPRESSOR.tool, "normal": AUTO_ROUND.tool}


@dataclass(frozen=True)
class Seconds:
    """tool, recipe    who, and how it was asked
    per_block        seconds a block; `whole`: for the 22 blocks of the full checkpoint, nothing else counted
    measured         what was measured, as pairs of a size and seconds
    """

    tool: str
    recipe: str
    per_block: float
    whole: float
    measured: tuple[tuple[int, float], ...]


def _from(tool: str, recipe: str, first: tuple[int, float], second: tuple[int, float], *, times: int = 1) -> Seconds:
    per_block = times * (second[1] - first[1]) / (second[0] - first[0])
    return Seconds(tool, recipe, per_block, FULL_BLOCKS * per_block, (first, second))


def _ours(bench: Bench, work: Path, effort: str) -> Seconds:
    def run(blocks: int) -> tuple[int, float]:
        out = work / "out"
        done = ours(bench.checkpoint(blocks), out, "--effort", effort, *CALIBRATED)
        shutil.rmtree(out)
        note(f"  {effort}, {blocks} blocks: {done.seconds:.1f} s")
        return blocks, done.seconds

    return _from(OURS, effort, run(FEW), run(MORE))


def _gptq(bench: Bench, work: Path, tokens: Path) -> Seconds:
    def run(blocks: int) -> tuple[int, float]:
        out = work / "out"
        done = LLM_COMPRESSOR.run(bench.checkpoint(blocks), out, scheme=SCHEME, solver="gptq", tokens=tokens)
        shutil.rmtree(out)
        note(f"  {LLM_COMPRESSOR.tool} gptq, {blocks} blocks: {done.seconds:.1f} s")
        return blocks, done.seconds

    return _from(LLM_COMPRESSOR.tool, "gptq", run(FEW), run(MORE))


def _auto_round(bench: Bench, tokens: Path) -> Seconds:
    def run(iterations: int) -> tuple[int, float]:
        command = [AUTO_ROUND.python, "-m", "benchmarks.peers.auto_round.timing", bench.checkpoint(1)]
        command += ["--scheme", SCHEME, "--tokens", tokens, "--iterations", str(iterations)]
        done = measure(command, environment={**os.environ, "PYTHONPATH": str(ROOT)})
        seconds = float(said(done)["seconds"])
        note(f"  {AUTO_ROUND.tool}, one block, {iterations} iterations: {seconds:.1f} s")
        return iterations, seconds

    first, second = (run(iterations) for iterations in ITERATIONS)
    return _from(AUTO_ROUND.tool, f"{DEFAULT_ITERATIONS} iterations", first, second, times=DEFAULT_ITERATIONS)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.efforts", description="Seconds a block of each effort.")
    parser.add_argument("--checkpoints", type=Path, help="where they are kept (default: benchmarks/.cache/synthetic)")
    parser.add_argument("--efforts", nargs="+", default=["fast", "normal", "best"])
    parser.add_argument("--out", type=Path, help="JSON to write (default: benchmarks/results/efforts.json)")
    arguments = parser.parse_args()
    facts = circumstances("benchmarks.efforts")
    checkpoints = arguments.checkpoints or cache("synthetic")
    checkpoints.mkdir(parents=True, exist_ok=True)
    absent = {peer.tool: reason for peer in (LLM_COMPRESSOR, AUTO_ROUND) if (reason := peer.why_not())}
    with tempfile.TemporaryDirectory(dir=cache(), prefix="efforts-") as scratch:
        work = Path(scratch)
        bench = Bench(checkpoints, work)
        found = [_ours(bench, work, effort) for effort in arguments.efforts]
        tokens = bench.tokens(bench.checkpoint(FEW))
        if LLM_COMPRESSOR.tool not in absent:
            found.append(_gptq(bench, work, tokens))
        if AUTO_ROUND.tool not in absent:
            found.append(_auto_round(bench, tokens))
    versions = {peer.tool: peer.versions() for peer in (LLM_COMPRESSOR, AUTO_ROUND) if peer.tool not in absent}
    content = {**facts, "peers": versions, "absent": absent, "scheme": SCHEME, "seconds": found}
    parts = [heading("Seconds of the efforts", facts), _markdown(found), *_notes(absent, versions), ""]
    save("efforts", content, "\n".join(parts), out=arguments.out)


def _markdown(found: list[Seconds]) -> str:
    by_tool = {one.tool: one for one in found}
    rows = []
    for one in found:
        peer = by_tool.get(LIMITS.get(one.recipe, "")) if one.tool == OURS else None
        share = "" if peer is None else f"{one.per_block / peer.per_block:.3f} of {peer.tool}'s"
        rows.append([one.tool, one.recipe, f"{one.per_block:.1f}", f"{one.whole:,.0f}", share])
    return table(["tool", "recipe", "s a block", f"s for {FULL_BLOCKS} blocks", "to be at most 1"], rows) + "\n"


def _notes(absent: dict[str, str], versions: dict[str, dict[str, str]]) -> list[str]:
    def named(peer: Peer) -> str:
        reason = absent.get(peer.tool)
        if reason:
            return f"- {peer.tool}: left out: {reason}"
        return f"- {peer.tool}: " + ", ".join(f"{name} {number}" for name, number in versions[peer.tool].items())

    return [
        f"- {SCHEME}, {SAMPLES} x {LENGTH} tokens. Differences of whole runs with {FEW} and {MORE} blocks; "
        f"of AutoRound, of {ITERATIONS[0]} and {ITERATIONS[1]} of {DEFAULT_ITERATIONS} iterations on one block.",
        *(named(peer) for peer in (LLM_COMPRESSOR, AUTO_ROUND)),
    ]


if __name__ == "__main__":
    main()
