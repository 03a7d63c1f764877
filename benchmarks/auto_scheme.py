"""Our plans beside those of AutoRound's AutoScheme on the shipped model, at the same bits of its linear layers.

    python -m benchmarks.auto_scheme [--averages 3.0,4.5,2.5,3.5] [--rounding nearest,auto-round] [--out FILE]

AutoScheme chooses among all its symmetric schemes for an average of bits, which it counts with zero points that are
not there; ours may take the bytes that its plan really takes, or fewer. Its plans are rounded by its own 200 iterations
a block, by its own rounding to nearest, and by our solvers: those compare the plans alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.judges import Score, paired
from benchmarks.peer_tools import AUTO_SCHEME
from benchmarks.plans import Quantizer
from benchmarks.results_file import cache, circumstances, heading, note, save, table
from benchmarks.rows import Tokens, calibration_tokens
from benchmarks.subjects import Subject, shipped

_OURS = {
    # With the data, to weigh errors by: theirs has it too.
    "nearest": ("--solver", "nearest", "--calibration", "built-in"),
    "fast": ("--effort", "fast"),
    "normal": ("--effort", "normal"),
}
# Rounding of theirs -> ours of that kind.
_ALIKE = {"nearest": "nearest", "auto-round": "normal"}


@dataclass(frozen=True)
class Made:
    """An artefact: whose plan, whose rounding, bits of sites, bytes of all tensors, mean KL and its standard error."""

    average: float
    plan: str
    rounding: str
    bpw_sites: float
    tensor_bytes: int
    loss: float
    loss_stderr: float


@dataclass(frozen=True)
class Compared:
    """Our plan beside another artefact. margin: mean over windows of (the other's loss - ours), its standard error."""

    average: float
    rounding: str
    other: str
    ratio: float
    margin: tuple[float, float]


@dataclass
class Bench:
    """What is measured with, and what has been found so far."""

    subject: Subject
    tokens: Tokens
    quantizer: Quantizer
    made: list[Made]
    compared: list[Compared]

    def measure(self, average: float, roundings: Sequence[str]) -> None:
        """Everything at one average."""
        plans, theirs = [], {}
        for rounding in roundings:
            run = AUTO_SCHEME.quantized(
                self.subject.path, scheme=str(average), solver=rounding, tokens=self.tokens.of(AUTO_SCHEME)
            )
            if "refused" in run.said:
                raise RuntimeError(f"AutoScheme {average} {rounding}: {run.said['refused']}")
            theirs[rounding] = self.subject.judge.score(run.artefact)
            plans.append(run.said["plan"])
            self._add(average, "AutoScheme", f"theirs, {rounding}", theirs[rounding])
        if any(plan != plans[0] for plan in plans):
            raise RuntimeError(f"AutoScheme {average}: its plan differs from run to run")
        file = self.quantizer.work / "plan.json"
        file.write_text(json.dumps({"pennyweight_plan": 1, "sites": plans[0]}), encoding="utf-8")
        size = self.quantizer.tensor_bytes(theirs[roundings[0]])
        for rounding, options in _OURS.items():
            same = self.quantizer.made(["--plan", str(file), *options])[1]
            self._add(average, "AutoScheme", f"ours, {rounding}", same)
            ours = self.quantizer.made([*self.quantizer.within(size), *options])[1]
            self._add(average, "ours", f"ours, {rounding}", ours)
            self._compare(average, rounding, "its plan, our rounding", ours, same)
            for other, score in theirs.items():
                if _ALIKE[other] == rounding:
                    self._compare(average, rounding, f"its plan, its {other}", ours, score)

    def _add(self, average: float, plan: str, rounding: str, score: Score) -> None:
        size = self.quantizer.tensor_bytes(score)
        self.made.append(Made(average, plan, rounding, score.sizes.bpw_sites, size, *score.mean_and_error))
        note(f"  {self.made[-1]}")

    def _compare(self, average: float, rounding: str, other: str, ours: Score, theirs: Score) -> None:
        ratio = ours.mean_and_error[0] / theirs.mean_and_error[0]
        self.compared.append(Compared(average, rounding, other, ratio, paired(theirs, ours)))
        note(f"  {self.compared[-1]}")


def markdown(facts: dict[str, Any], versions: dict[str, str], bench: Bench) -> str:
    """The result to read."""
    made = [
        [f"{one.average:g}", one.plan, one.rounding, f"{one.bpw_sites:.4f}", f"{one.tensor_bytes:,}",
         f"{one.loss:.4g}", f"{one.loss_stderr:.2g}"]
        for one in bench.made
    ]  # fmt: skip
    compared = [
        [f"{one.average:g}", f"ours, {one.rounding}", one.other, f"{one.ratio:.3f}",
         "yes" if one.margin[0] >= 0 else "**NO**", f"{one.margin[0] / one.margin[1]:+.1f} se"]
        for one in bench.compared
    ]  # fmt: skip
    return "\n".join(
        [
            heading("Plans beside AutoScheme's", facts),
            f"{', '.join(f'{name} {number}' for name, number in versions.items())}\n",
            "## Our plan over its\n",
            table(["average", "our plan, rounded by", "beside", "KL / KL", "no more", "margin"], compared),
            "\n## Everything that was made\n",
            table(["average", "plan", "rounded by", "bits of sites", "bytes", "KL", "se"], made),
            "\n- average: of the bits of linear layers, as AutoScheme counts and is asked; bits of sites: what they "
            "are, scales included and zero points, which there are none of, not. bytes: of all tensors.",
            "- nearest: to the nearest code, with scales searched for, by each tool's own search; auto-round: 200 "
            "iterations a block, the library's default.",
            "- KL: mean over held-out.txt, windows of 512 tokens. margin: mean over windows of (the other - ours), in "
            "its own standard errors.",
            "",
        ]
    )


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.auto_scheme", description="Plans beside AutoScheme's.")
    parser.add_argument("--averages", default="2.5,3.0,3.5,4.5", help="bits, commas between (default: %(default)s)")
    parser.add_argument("--rounding", default="nearest,auto-round", help="theirs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON to write, .md beside it (default: in benchmarks/results)")
    arguments = parser.parse_args()
    facts = circumstances("benchmarks.auto_scheme")
    with tempfile.TemporaryDirectory(dir=cache(), prefix="auto-scheme-") as directory:
        work = Path(directory)
        subject = shipped()
        weights = hashlib.sha256((subject.path / "model.safetensors").read_bytes()).hexdigest()[:16]
        os.environ["AR_AUTO_SCHEME_CACHE"] = str(cache(f"auto-scheme-scores-{weights}"))
        bench = Bench(subject, calibration_tokens(subject, work), Quantizer.of(subject, work), [], [])
        for average in map(float, arguments.averages.split(",")):
            note(f"{average}:")
            bench.measure(average, arguments.rounding.split(","))
    content = {**facts, "peer": AUTO_SCHEME.versions(), "made": bench.made, "compared": bench.compared}
    save("auto_scheme", content, markdown(facts, AUTO_SCHEME.versions(), bench), out=arguments.out)


if __name__ == "__main__":
    main()
