"""Time and memory of a data-free GGUF of a synthetic Llama, beside llama.cpp's converter and quantizer together.

    python -m benchmarks.gguf_speed [--blocks 22] [--types Q4_K ...] [--repeats 3] [--checkpoints DIR] [--out FILE]

Every matrix of the blocks in one type, embedding and output in Q6_K, no importance, two threads on both sides. The peer
first writes a bfloat16 GGUF, as it must, and quantizes that. Each run is a process of its own, imports included, our
verification left out; the two take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import llama_tools
from benchmarks.processes import Measured, measure
from benchmarks.results_file import cache, circumstances, heading, mib, note, project_environment, save, table
from benchmarks.speed import Bench, read_all

OURS, PEER = "pennyweight", "llama.cpp"
# Peak memory at most, and seconds as a part of the peer's.
LARGEST_BYTES, LARGEST_SHARE = 1e9, 1.0
_CONVERT = Path(__file__).parent / "peers" / "llama_cpp" / "convert.py"


@dataclass(frozen=True)
class Run:
    """One measured run; the peer's two processes one after the other. `load` is the load average just before it."""

    kind: str
    tool: str
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    file_bytes: int
    load: float


def ours(model: Path, kind: str, work: Path) -> Run:
    load = os.getloadavg()[0]
    out = work / "out"
    command = [sys.executable, "-m", "pennyweight.cli.main", "quantize", model, "--out", out, "--json", "--for",
               "llama.cpp", "--scheme", kind.lower(), "--calibration", "none", "--verify", "none"]  # fmt: skip
    done = measure(command, environment=project_environment())
    run = _run(kind, OURS, [done], out / "model.gguf", load)
    shutil.rmtree(out)
    return run


def peers(model: Path, kind: str, work: Path) -> Run:
    load = os.getloadavg()[0]
    floats, out = work / "floats.gguf", work / "quantized.gguf"
    converted = measure([sys.executable, _CONVERT, llama_tools.converter(), model, floats],
                        environment=project_environment())  # fmt: skip
    ends = ["--token-embedding-type", "q6_k", "--output-tensor-type", "q6_k"]
    quantized = measure([llama_tools.tool("llama-quantize"), "--pure", *ends, floats, out, kind, os.cpu_count() or 1])
    run = _run(kind, PEER, [converted, quantized], out, load)
    floats.unlink()
    out.unlink()
    return run


def _run(kind: str, tool: str, parts: Sequence[Measured], file: Path, load: float) -> Run:
    run = Run(
        kind, tool, sum(part.seconds for part in parts), sum(part.cpu_seconds for part in parts),
        max(part.peak_memory_bytes for part in parts), file.stat().st_size, round(load, 2),
    )  # fmt: skip
    each = " + ".join(f"{part.seconds:.1f}" for part in parts)
    note(f"  {kind} {tool}: {each} s, {mib(run.peak_memory_bytes)} MiB")
    return run


def as_markdown(runs: Sequence[Run]) -> str:
    head = [
        "type",
        "tool",
        "runs",
        "seconds",
        "fastest - slowest",
        "processor s",
        "peak MiB",
        "file",
        "seconds / peer's",
    ]
    rows = []
    for kind in dict.fromkeys(run.kind for run in runs):
        of_peer = [run.seconds for run in runs if (run.kind, run.tool) == (kind, PEER)]
        for tool in (OURS, PEER):
            some = [run for run in runs if (run.kind, run.tool) == (kind, tool)]
            if some:
                seconds = [run.seconds for run in some]
                share = statistics.median(seconds) / statistics.median(of_peer) if of_peer and tool == OURS else None
                rows.append([
                    kind, tool, str(len(some)), f"{statistics.median(seconds):.1f}",
                    f"{min(seconds):.1f} - {max(seconds):.1f}",
                    f"{statistics.median(run.cpu_seconds for run in some):.1f}",
                    mib(statistics.median(run.peak_memory_bytes for run in some)), f"{some[0].file_bytes:,}",
                    "" if share is None else f"**{share:.2f}**",
                ])  # fmt: skip
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--types", nargs="+", default=["Q4_K"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoints", type=Path, help="where they are kept (default: benchmarks/.cache/synthetic)")
    parser.add_argument("--out", type=Path, help="JSON to write, .md beside it")
    arguments = parser.parse_args()
    absent = llama_tools.why_not()
    if absent:
        sys.exit(absent)
    facts = circumstances("benchmarks.gguf_speed")
    facts["versions"] |= llama_tools.versions()
    checkpoints = arguments.checkpoints or cache("synthetic")
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(dir=cache(), prefix="gguf-speed-") as work:
        model = Bench(checkpoints, Path(work)).checkpoint(arguments.blocks)
        for kind in arguments.types:
            for _ in range(arguments.repeats):
                for one in (ours, peers):
                    read_all(model)
                    os.sync()
                    runs.append(one(model, kind, Path(work)))
    notes = [
        f"- {arguments.blocks} blocks, every matrix in the type, embedding and output in Q6_K; no importance.",
        "- Whole processes, imports included, our verification left out; the peer's are its converter, which writes",
        "  bfloat16, and llama-quantize. Peak memory is resident, mapped file pages included.",
        f"- load average before the runs: {min(run.load for run in runs)} to {max(run.load for run in runs)}",
    ]
    markdown = "\n".join([heading("Time and memory of GGUF files", facts), as_markdown(runs), "", *notes, ""])
    save("gguf-speed", {**facts, "runs": [asdict(run) for run in runs]}, markdown, out=arguments.out)


if __name__ == "__main__":
    main()
