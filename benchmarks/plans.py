"""What a plan is worth: its loss beside that of one scheme everywhere, and of a heuristic, at the same bytes.

    python -m benchmarks.plans [--effort fast] [--out FILE]

The shipped model, embeddings as they are on both sides. Each uniform scheme, and each heuristic mix (first and last
block and all down projections in the higher of two schemes), is quantized and judged; then the best plan that takes no
more bytes of tensors. How exactly sizes are met, and what a second budget takes, stand below.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.judges import DecoderJudge, Score, paired
from benchmarks.results_file import ROOT, cache, circumstances, heading, note, project_environment, save, table

_MODEL = ROOT / "src" / "pennyweight" / "demo_model"
UNIFORM = ("int2-g64", "int2-g32", "int3-g128", "int3-g64", "int3-g32", "int4-g128", "int4-g32", "int5-g128")
# The lower and the higher scheme of a mix.
HEURISTIC = (("int2-g64", "int3-g64"), ("int2-g64", "int4-g64"), ("int3-g128", "int4-g128"), ("int4-g128", "int5-g128"))
# What is asked of KL(plan) / KL(other).
ASKED = {"uniform": 0.85, "heuristic": 0.9}
_SIZES = 10


@dataclass(frozen=True)
class Pair:
    """A way to choose schemes, and the plan of no more bytes: bits of all tensors and of sites, and mean KL.

    margin   mean over windows of (asked x other - plan), and its standard error
    """

    kind: str
    other: str
    bpw_sites: float
    tensor_bytes: int
    plan_bytes: int
    loss: float
    plan_loss: float
    margin: tuple[float, float]

    @property
    def ratio(self) -> float:
        return self.plan_loss / self.loss


def pairs(judge: DecoderJudge, effort: str, work: Path) -> Iterator[Pair]:
    """Every uniform scheme and every heuristic beside its plan."""
    others = [("uniform", name, ["--scheme", name]) for name in UNIFORM]
    others += [("heuristic", f"{low} and {high}", _promoted(low, high)) for low, high in HEURISTIC]
    for kind, name, options in others:
        report, score = _made(judge, [*options, "--effort", effort], work)
        size = _tensor_bytes(score)
        # Budgets are cut to whole bytes: half a byte more meets the size itself.
        _, plan_score = _made(judge, ["--bpw", repr(8 * (size + 0.5) / _weights()), "--effort", effort], work)
        mean, error = paired(plan_score, score, factor=ASKED[kind])
        found = Pair(
            kind,
            name,
            report["bpw_sites"],
            size,
            _tensor_bytes(plan_score),
            score.mean_and_error[0],
            plan_score.mean_and_error[0],
            (-mean, error),
        )
        note(f"  {kind} {name}: {found.loss:.4g}, plan {found.plan_loss:.4g}: {found.ratio:.3f}")
        yield found


def _promoted(low: str, high: str) -> list[str]:
    from pennyweight.models.streamed import StreamedModel

    last = len(StreamedModel(_MODEL).blocks) - 1
    globs = ("*.down_proj", "model.layers.0.*", f"model.layers.{last}.*")
    return ["--scheme", low, *(part for glob in globs for part in ("--at", f"{glob}={high}"))]


def _made(judge: DecoderJudge, options: Sequence[str], work: Path) -> tuple[dict[str, Any], Score]:
    out = work / "artefact"
    shutil.rmtree(out, ignore_errors=True)
    report = _command(["quantize", str(_MODEL), "--out", str(out), *options, "--verify", "none"])
    return report, judge.score(out)


def _command(arguments: Sequence[str]) -> dict[str, Any]:
    """What `pennyweight ... --json` answers."""
    command = [sys.executable, "-m", "pennyweight.cli.main", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=project_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _weights() -> int:
    from pennyweight.models.streamed import StreamedModel
    from pennyweight.pipeline.sizes import weight_count

    return weight_count(StreamedModel(_MODEL))


def _tensor_bytes(score: Score) -> int:
    return round(score.sizes.bpw * _weights() / 8)


@dataclass(frozen=True)
class Met:
    """A size that was asked of the whole output, and what was written."""

    asked: int
    written: int


def sizes(work: Path) -> tuple[list[Met], float, float]:
    """Sizes from the smallest plan to 8 bits of all tensors; seconds of the first budget and of a second one."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=work) as directory:
        copy = Path(directory) / "model"
        shutil.copytree(_MODEL, copy, ignore=shutil.ignore_patterns(".pennyweight"))
        first = _command(["plan", str(copy), "--bpw", "5"])
        seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        _command(["plan", str(copy), "--bpw", "6"])
        again = time.perf_counter() - begun
        smallest = first["smallest_bytes"] + _beside(work, first["smallest_bytes"])
        largest = _weights()
        met = []
        for step in range(_SIZES):
            asked = int(smallest + step / (_SIZES - 1) * (largest - smallest))
            out = work / "sized"
            shutil.rmtree(out, ignore_errors=True)
            options = ["--size", str(asked), "--solver", "nearest", "--verify", "none"]
            report = _command(["quantize", str(copy), "--out", str(out), *options])
            met.append(Met(asked, report["size_bytes"]))
            note(f"  size {asked:,}: {report['size_bytes']:,}")
    return met, seconds, again


def _beside(work: Path, tensors: int) -> int:
    """A bound for what lies beside the tensors."""
    carried = sum((_MODEL / name).stat().st_size for name in ("tokenizer.json", "held-out.txt"))
    return carried + 60_000


def markdown(facts: dict[str, Any], found: Sequence[Pair], met: Sequence[Met], first: float, again: float) -> str:
    """The result to read."""
    head = ["beside", "bits of sites", "bytes", "plan's bytes", "KL", "plan's KL", "ratio", "asked", "holds", "margin"]
    rows = [
        [
            f"{pair.kind} {pair.other}", f"{pair.bpw_sites:.3f}", f"{pair.tensor_bytes:,}", f"{pair.plan_bytes:,}",
            f"{pair.loss:.4g}", f"{pair.plan_loss:.4g}", f"{pair.ratio:.3f}", f"{ASKED[pair.kind]:.2f}",
            "yes" if pair.margin[0] >= 0 else "**NO**", f"{pair.margin[0] / pair.margin[1]:+.1f} se",
        ]
        for pair in found
    ]  # fmt: skip
    sized = [[f"{one.asked:,}", f"{one.written:,}", f"{100 * (1 - one.written / one.asked):.2f} %"] for one in met]
    return "\n".join(
        [
            heading("Plans", facts),
            "## Loss at the same bytes\n",
            table(head, rows),
            "\n- bytes of all tensors; KL: mean over held-out.txt, windows of 512 tokens.",
            "- margin: mean over windows of (asked x other - plan), in its own standard errors.\n",
            "## Sizes of the whole output\n",
            table(["asked", "written", "left"], sized),
            f"\nThe first budget took {first:.1f} s with the measuring of costs, a second one {again:.1f} s.",
            "",
        ]
    )


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description="What a plan is worth.")
    parser.add_argument("--effort", default="fast", help="of all runs (default: fast)")
    parser.add_argument(
        "--out", type=Path, help="JSON to write, .md beside it (default: benchmarks/results/plans.json)"
    )
    arguments = parser.parse_args()
    facts = circumstances("benchmarks.plans")
    judge = DecoderJudge(_MODEL, _MODEL / "held-out.txt", length=512, samples=None)
    with tempfile.TemporaryDirectory(dir=cache(), prefix="plans-") as directory:
        found = list(pairs(judge, arguments.effort, Path(directory)))
        met, first, again = sizes(Path(directory))
    content = {**facts, "effort": arguments.effort, "pairs": found, "sizes": met, "first": first, "again": again}
    save("plans", content, markdown(facts, found, met, first, again), out=arguments.out)


if __name__ == "__main__":
    main()
