"""What a plan is worth: its loss beside that of one scheme everywhere, and of a heuristic, at the same bytes.

    python -m benchmarks.plans [--effort fast] [--out FILE]

The shipped model, embeddings as they are on both sides. Each uniform scheme, and each heuristic mix (first and last
block and all down projections in the higher of two schemes), is quantized and judged; then the best plan that takes no
more bytes of tensors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.judges import Score, paired
from benchmarks.results_file import cache, circumstances, heading, note, project_environment, save, table
from benchmarks.subjects import Subject, shipped

UNIFORM = ("int2-g64", "int2-g32", "int3-g128", "int3-g64", "int3-g32", "int4-g128", "int4-g32", "int5-g128")
# The lower and the higher scheme of a mix.
HEURISTIC = (("int2-g64", "int3-g64"), ("int2-g64", "int4-g64"), ("int3-g128", "int4-g128"), ("int4-g128", "int5-g128"))
# What is asked of KL(plan) / KL(other).
ASKED = {"uniform": 0.85, "heuristic": 0.9}


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


def pairs(quantizer: Quantizer, effort: str) -> Iterator[Pair]:
    """Every uniform scheme and every heuristic beside its plan."""
    others = [("uniform", name, ["--scheme", name]) for name in UNIFORM]
    others += [("heuristic", f"{low} and {high}", _promoted(quantizer, low, high)) for low, high in HEURISTIC]
    for kind, name, options in others:
        report, score = quantizer.made([*options, "--effort", effort])
        size = quantizer.tensor_bytes(score)
        _, plan_score = quantizer.made([*quantizer.within(size), "--effort", effort])
        mean, error = paired(plan_score, score, factor=ASKED[kind])
        found = Pair(
            kind,
            name,
            report["bpw_sites"],
            size,
            quantizer.tensor_bytes(plan_score),
            score.mean_and_error[0],
            plan_score.mean_and_error[0],
            (-mean, error),
        )
        note(f"  {kind} {name}: {found.loss:.4g}, plan {found.plan_loss:.4g}: {found.ratio:.3f}")
        yield found


def _promoted(quantizer: Quantizer, low: str, high: str) -> list[str]:
    from pennyweight.models.streamed import StreamedModel

    last = len(StreamedModel(quantizer.subject.path).blocks) - 1
    globs = ("*.down_proj", "model.layers.0.*", f"model.layers.{last}.*")
    return ["--scheme", low, *(part for glob in globs for part in ("--at", f"{glob}={high}"))]


@dataclass(frozen=True)
class Quantizer:
    """Quantizes the model of `subject` in the directory `work`, and judges. weights: how many the model has."""

    subject: Subject
    work: Path
    weights: int

    @classmethod
    def of(cls, subject: Subject, work: Path) -> Quantizer:
        from pennyweight.models.streamed import StreamedModel
        from pennyweight.pipeline.sizes import weight_count

        return cls(subject, work, weight_count(StreamedModel(subject.path)))

    def made(self, options: Sequence[str]) -> tuple[dict[str, Any], Score]:
        """What the run reports of an artefact, and how far it is from the original."""
        out = self.work / "artefact"
        shutil.rmtree(out, ignore_errors=True)
        report = command(["quantize", str(self.subject.path), "--out", str(out), *options, "--verify", "none"])
        return report, self.subject.judge.score(out)

    def within(self, size_bytes: int) -> list[str]:
        """Options for a plan whose tensors take at most so many bytes."""
        # Budgets are cut to whole bytes: half a byte more meets the size itself.
        return ["--bpw", repr(8 * (size_bytes + 0.5) / self.weights)]

    def tensor_bytes(self, score: Score) -> int:
        """Bytes of all tensors of what was judged."""
        return round(score.sizes.bpw * self.weights / 8)


def command(arguments: Sequence[str]) -> dict[str, Any]:
    """What `pennyweight ... --json` answers."""
    words = [sys.executable, "-m", "pennyweight.cli.main", *arguments, "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=project_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-500:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def markdown(facts: dict[str, Any], found: Sequence[Pair]) -> str:
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
    return "\n".join(
        [
            heading("Plans", facts),
            "## Loss at the same bytes\n",
            table(head, rows),
            "\n- bytes of all tensors; KL: mean over held-out.txt, windows of 512 tokens.",
            "- margin: mean over windows of (asked x other - plan), in its own standard errors.",
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
    with tempfile.TemporaryDirectory(dir=cache(), prefix="plans-") as directory:
        work = Path(directory)
        subject = shipped()
        found = list(pairs(Quantizer.of(subject, work), arguments.effort))
    content = {**facts, "effort": arguments.effort, "pairs": found}
    save("plans", content, markdown(facts, found), out=arguments.out)


if __name__ == "__main__":
    main()
