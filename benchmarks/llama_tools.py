"""llama.cpp: its tools, built by `make llama-tools`, and its logits, by way of llama-cpp-python."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from benchmarks.results_file import ROOT, note
from pennyweight.evaluate import llama_cpp
from pennyweight.evaluate.compare import mean_and_error, score_logits
from pennyweight.models import text

_PLACE = ROOT / ".venvs" / "llama.cpp"
_LOG_TAIL = 2000


def why_not() -> str | None:
    """Why llama.cpp cannot be run here, or None."""
    if not (_PLACE / "bin" / "llama-quantize").exists():
        return "llama-quantize is not built: make llama-tools"
    if not llama_cpp.is_installed():
        return f"llama-cpp-python is not installed: pip install llama-cpp-python=={tools_version()}"
    return None


def tools_version() -> str:
    """Version of llama-cpp-python from whose sources the tools were built."""
    return (_PLACE / "version").read_text(encoding="utf-8").strip()


def versions() -> dict[str, str]:
    return {"llama-cpp-python": version("llama-cpp-python"), "llama.cpp's tools of": tools_version()}


def tool(name: str) -> Path:
    return _PLACE / "bin" / name


def converter() -> Path:
    """The directory of convert_hf_to_gguf.py."""
    return _PLACE / "converter"


def run_tool(name: str, *words: object) -> None:
    """Raises RuntimeError with what the tool said last."""
    command = [str(tool(name)), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout.decode(errors='replace')[-_LOG_TAIL:]}")


def write_importance(floats: Path, source: str, model: Path, out: Path, *, length: int, threads: int) -> Path:
    """What llama-imatrix makes of all of the text `source`, in windows of `length` tokens."""
    tokenizer = text.load_tokenizer(model)
    special = text.special_tokens(tokenizer)
    between = tokenizer.decode([*special.after, *special.before])
    words = out.with_suffix(".txt")
    words.write_text(between.join(text.documents(source, tokenizer)), encoding="utf-8")
    options = ["--parse-special", "--no-ppl", "-c", length, "-t", threads]
    run_tool("llama-imatrix", "-m", floats, "-f", words, "-o", out, *options)
    return out


@dataclass(frozen=True)
class Losses:
    """Mean KL a token of each window, in nats."""

    windows: Sequence[float]

    @property
    def mean_and_error(self) -> tuple[float, float]:
        return mean_and_error(self.windows)

    def less(self, factor: float, other: Losses) -> tuple[float, float]:
        """Mean of this - factor * other over the same windows, and its standard error."""
        return mean_and_error([a - factor * b for a, b in zip(self.windows, other.windows, strict=True)])


class LlamaJudge:
    """KL(reference || file), both run by llama.cpp with a float32 cache."""

    def __init__(self, reference: Path, windows: Sequence[Tensor]) -> None:
        self.windows = windows
        note("  logits of the reference")
        self._reference = list(self.logits(reference))

    def score(self, file: Path) -> Losses:
        """Of the `file` to the reference."""
        return self._losses(self._reference, self.logits(file))

    def score_against(self, file: Path, reference: Path) -> Losses:
        """Of the `file` to another reference."""
        return self._losses(self.logits(reference), self.logits(file))

    def logits(self, file: Path) -> Iterator[Tensor]:
        """float32 [tokens, vocabulary] of each window, each read with nothing before it."""
        with llama_cpp.opened(file, context=len(self.windows[0])) as model:
            for window in self.windows:
                yield model.logits(window[None])[0]

    def _losses(self, references: Sequence[Tensor] | Iterator[Tensor], found: Iterator[Tensor]) -> Losses:
        scores = [
            score_logits(logits, reference, ids)
            for logits, reference, ids in zip(found, references, self.windows, strict=True)
        ]
        return Losses([score.kl / score.tokens for score in scores])
