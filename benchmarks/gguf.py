"""Our GGUF files beside those of llama.cpp's own quantizer, of the same size, judged by llama.cpp.

    python -m benchmarks.gguf [--rows Q4_K ...] [--efforts fast ...] [--out FILE]

The shipped model. Single types: every matrix of the blocks in that type (llama-quantize --pure), the embedding, which
is the output too, in bf16 on both sides. Mixes: llama-quantize's own, and our plan of no more bytes of tensors. The
peer's importance is llama-imatrix's of the whole text from which our calibration windows are drawn.

A row is written as soon as it is measured; a later run at the same commit and versions measures only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import llama_tools
from benchmarks.gguf_files import tensor_bytes, write_decoded, write_floats
from benchmarks.judges import DecoderJudge
from benchmarks.llama_tools import LlamaJudge, Losses
from benchmarks.processes import measure
from benchmarks.results_file import RESULTS, cache, circumstances, heading, note, project_environment, save, table
from benchmarks.subjects import Subject, shipped

EFFORTS = ("fast", "normal", "best")
# What is asked of KL(ours) / KL(llama-quantize's).
TYPES = {"Q4_0": 0.7, "Q4_K": 0.7, "Q5_K": 0.7, "Q3_K": 0.65, "IQ4_XS": 0.65, "Q2_K": 0.6}
MIXES = {"Q4_K_M": 0.6, "Q3_K_M": 0.55, "Q2_K mix": 0.5}
_EMBEDDING = "bf16"
_HEAD = ["", "effort", "bytes", "llama-quantize's", "KL", "its runtime's", "llama-quantize's KL", "its runtime's",
         "ratio", "asked", "holds", "margin", "s"]  # fmt: skip
_NOTES = """
- All logits are llama.cpp's, cache in float32. KL(original || file) in nats a token: mean over {windows} windows of 512
  tokens of held-out.txt, and its standard error over windows. The original is the model as F32.
- Its runtime's: KL(the file's weights decoded to F32 || the file), what llama.cpp's own int8 activations add.
- Bytes of all tensors; what is beside them is the same but for a few names.
- Q4_0 to Q2_K: every matrix of the blocks in that type; the embedding, which is the output too, in bf16 on both sides.
- Q4_K_M, Q3_K_M, Q2_K mix: llama-quantize's own mixes, embedding included, and our plan of no more bytes.
- llama-quantize is given what llama-imatrix makes of all of the built-in text (224 windows of 512 tokens); our runs
  calibrate on 128 windows of it.
- margin: mean over windows of (asked x llama-quantize's - ours), in its own standard errors.
"""


@dataclass(frozen=True)
class Side:
    """A file: bytes of all its tensors and of itself; mean KL to the original with its error; and the runtime's share,
    KL of the file to its own weights decoded to float32."""

    tensor_bytes: int
    file_bytes: int
    loss: tuple[float, float]
    share: tuple[float, float]


@dataclass(frozen=True)
class Row:
    """margin: mean over windows of (asked x theirs - ours), and its standard error. seconds: of our run."""

    name: str
    effort: str
    ours: Side
    theirs: Side
    asked: float
    margin: tuple[float, float]
    seconds: float

    @property
    def ratio(self) -> float:
        return self.ours.loss[0] / self.theirs.loss[0]


@dataclass(frozen=True)
class Bench:
    """The subject, and where files lie while they are looked at."""

    subject: Subject
    work: Path
    threads: int

    @cached_property
    def floats(self) -> Path:
        return write_floats(self.subject.path, self.work / "f32.gguf")

    @cached_property
    def judge(self) -> LlamaJudge:
        assert isinstance(self.subject.judge, DecoderJudge)
        return LlamaJudge(self.floats, self.subject.judge.windows)

    @cached_property
    def importance(self) -> Path:
        """Kept by content: the tool takes minutes."""
        model = hashlib.sha256(self.floats.read_bytes()).hexdigest()
        said = json.dumps([model, self.subject.calibration, self.subject.length, llama_tools.tools_version()])
        file = cache("llama.cpp") / f"imatrix-{hashlib.sha256(said.encode()).hexdigest()[:16]}.gguf"
        if not file.exists():
            note("  llama-imatrix")
            made = self.work / "imatrix.gguf"
            llama_tools.write_importance(
                self.floats, self.subject.calibration, self.subject.path, made,
                length=self.subject.length, threads=self.threads,
            )  # fmt: skip
            shutil.move(made, file)
        return file

    def theirs(self, name: str) -> tuple[Path, Side, Losses]:
        """What llama-quantize makes."""
        pure = ["--pure", "--token-embedding-type", _EMBEDDING, "--output-tensor-type", _EMBEDDING]
        out = self.work / "theirs.gguf"
        options = pure if name in TYPES else []
        words = [*options, self.floats, out, name.removesuffix(" mix"), self.threads]
        llama_tools.run_tool("llama-quantize", "--imatrix", self.importance, *words)
        return out, *self._side(out)

    def ours(self, name: str, effort: str, peer: Path) -> tuple[Side, Losses, float]:
        """What a run of ours makes of the same size, and its seconds."""
        out = self.work / "ours"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "pennyweight.cli.main", "quantize", self.subject.path, "--out", out]
        command += ["--for", "llama.cpp", "--effort", effort, "--calibration", self.subject.calibration]
        command += ["--samples", self.subject.samples, "--length", self.subject.length, "--verify", "none", "--json"]
        command += self._choice(name, peer)
        done = measure(command, environment=project_environment())
        side, losses = self._side(out / "model.gguf")
        return side, losses, round(done.seconds, 1)

    def _choice(self, name: str, peer: Path) -> list[str]:
        if name in TYPES:
            return ["--scheme", name.lower(), "--keep", "model.embed_tokens"]
        from pennyweight.models.streamed import StreamedModel
        from pennyweight.pipeline.sizes import weight_count

        # Budgets are cut to whole bytes: half a byte more meets the size itself.
        return ["--bpw", repr(8 * (tensor_bytes(peer) + 0.5) / weight_count(StreamedModel(self.subject.path)))]

    def _side(self, file: Path) -> tuple[Side, Losses]:
        losses = self.judge.score(file)
        decoded = write_decoded(file, self.work / "decoded.gguf")
        share = self.judge.score_against(file, decoded)
        found = Side(tensor_bytes(file), file.stat().st_size, losses.mean_and_error, share.mean_and_error)
        return found, losses

    def rows(self, names: Sequence[str], efforts: Sequence[str], known: Sequence[Row]) -> Iterator[Row]:
        """Those asked for that are not known, as they are measured."""
        done = {(row.name, row.effort) for row in known}
        for name in names:
            missing = [effort for effort in efforts if (name, effort) not in done]
            if not missing:
                continue
            peer, theirs, their_losses = self.theirs(name)
            for effort in missing:
                ours, losses, seconds = self.ours(name, effort, peer)
                if ours.tensor_bytes > theirs.tensor_bytes:
                    raise RuntimeError(
                        f"{name}: {ours.tensor_bytes:,} bytes of ours, {theirs.tensor_bytes:,} of theirs"
                    )
                asked = (TYPES | MIXES)[name]
                mean, error = losses.less(asked, their_losses)
                row = Row(name, effort, ours, theirs, asked, (-mean, error), seconds)
                note(f"  {name} {effort}: {ours.loss[0]:.4g} / {theirs.loss[0]:.4g} = {row.ratio:.3f}, {seconds} s")
                yield row


def known_rows(path: Path, facts: dict[str, Any]) -> list[Row]:
    """Those of a result that was made at the same commit with the same versions."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(found[key] == facts[key] for key in ("commit", "versions")) and "changes" not in facts["commit"]
    return [_row(row) for row in found["rows"]] if same else []


def _row(values: dict[str, Any]) -> Row:
    def side(part: dict[str, Any]) -> Side:
        return Side(part["tensor_bytes"], part["file_bytes"], tuple(part["loss"]), tuple(part["share"]))

    sides = {key: side(values[key]) for key in ("ours", "theirs")}
    return Row(**{**values, **sides, "margin": tuple(values["margin"])})


def markdown(facts: dict[str, Any], rows: Sequence[Row], windows: int) -> str:
    """The result to read."""
    order = [*TYPES, *MIXES]
    listed = sorted(rows, key=lambda row: (order.index(row.name), EFFORTS.index(row.effort)))
    return "\n".join(
        [
            heading("GGUF: our files beside llama-quantize's", facts),
            table(_HEAD, [_cells(row) for row in listed]),
            _NOTES.format(windows=windows),
        ]
    )


def _cells(row: Row) -> list[str]:
    return [
        row.name, row.effort, f"{row.ours.tensor_bytes:,}", f"{row.theirs.tensor_bytes:,}",
        _with_error(row.ours.loss), f"{row.ours.share[0]:.2g}",
        _with_error(row.theirs.loss), f"{row.theirs.share[0]:.2g}",
        f"{row.ratio:.3f}", f"{row.asked:.2f}", "yes" if row.margin[0] >= 0 else "**NO**",
        f"{row.margin[0] / row.margin[1]:+.1f} se", f"{row.seconds:.0f}",
    ]  # fmt: skip


def _with_error(loss: tuple[float, float]) -> str:
    return f"{loss[0]:.3g} ± {loss[1]:.1g}"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gguf", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=[*TYPES, *MIXES], default=[*TYPES, *MIXES], help="default: all")
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=EFFORTS, help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp's tools (default: 1)")
    parser.add_argument("--out", type=Path, help="JSON to write, .md beside it (default: benchmarks/results/gguf.json)")
    arguments = parser.parse_args()
    reason = llama_tools.why_not()
    if reason is not None:
        parser.error(reason)
    facts = circumstances("benchmarks.gguf")
    facts["versions"] |= llama_tools.versions()
    rows = known_rows(arguments.out or RESULTS / "gguf.json", facts)
    with tempfile.TemporaryDirectory(dir=cache(), prefix="gguf-") as directory:
        bench = Bench(shipped(), Path(directory), arguments.threads)
        for row in bench.rows(arguments.rows, arguments.efforts, rows):
            rows.append(row)
            windows = len(bench.judge.windows)
            content = {**facts, "windows": windows, "rows": [dataclasses.asdict(row) for row in rows]}
            save("gguf", content, markdown(facts, rows, windows), out=arguments.out)


if __name__ == "__main__":
    main()
