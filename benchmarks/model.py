"""A whole model beside llama.cpp: tokens a second of prompt and of text, memory, load time, on the same threads.

    python -m benchmarks.model [--blocks 22] [--rounds 3] [--prompt 512] [--decode 64] [--checkpoints DIR] [--out FILE]

The synthetic Llama in our int4-g32 and int4-g128, the head in int6-g32, and in llama.cpp's Q4_0 and Q4_K_M. Every
contestant is a process of its own that has loaded its model and waits; in each round each writes once, after a
streaming read. Figures are medians, ratios medians of each round's. Ours runs as `pennyweight run` does, with
activations of 8 bits and exact ones, and through transformers' generate.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import llama_tools
from benchmarks.model_contestants import PEER
from benchmarks.processes import CommandError, measure
from benchmarks.results_file import cache, circumstances, heading, mib, note, project_environment, save, table
from benchmarks.speed import Bench, read_all

THREADS = 2
SCHEMES = ("int4-g32", "int4-g128")
HEAD = "lm_head=int6-g32"
KINDS = ("Q4_0", "Q4_K_M")
# The synthetic model's tokenizer is one that llama.cpp does not load; it is given tokens.
_NO_TOKENIZER = ("--override-kv", "tokenizer.ggml.model=str:no_vocab")
# Threads that spin after their work is done are asleep by then.
_PAUSE_S = 0.1
_CONVERT = Path(__file__).parent / "peers" / "llama_cpp" / "convert.py"


@dataclass
class Contestant:
    """A process of model_contestants. `first` is what it said when it had loaded, the rest its answers by round."""

    name: str
    kind: str
    model: Path | None
    process: subprocess.Popen[str]
    first: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, float]] = field(default_factory=list)
    read_bytes_per_s: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, kind: str, model: Path | None, context: int) -> Contestant:
        words = [sys.executable, "-m", "benchmarks.model_contestants", kind, *([str(model)] if model else [])]
        words += ["--threads", str(THREADS), "--context", str(context)]
        process = subprocess.Popen(
            words, env=project_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        contestant = cls(name, kind, model, process)
        contestant.first = contestant._answer()
        note(f"  {name}: loaded in {contestant.first['load_s']:.2f} s")
        return contestant

    def ask(self, prompt: int, decode: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "decode": decode}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise CommandError(f"{self.name} ended with {self.process.wait()}; see above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def figure(self, prompt: int, decode: int) -> dict[str, Any]:
        """Medians of the rounds, and the sizes."""
        assert self.model is not None
        last = self.answers[-1]
        return {
            "name": self.name,
            "kind": self.kind,
            "prompt_tokens_per_s": round(prompt / statistics.median(one["prompt_s"] for one in self.answers), 2),
            "decode_tokens_per_s": round(decode / statistics.median(one["decode_s"] for one in self.answers), 2),
            "read_gb_per_s": round(statistics.median(self.read_bytes_per_s) / 1e9, 2),
            "model_bytes": size_of(self.model),
            **{key: last[key] for key in ("resident_bytes", "of_files_bytes", "peak_bytes")},
            **{key: value for key, value in self.first.items() if key in ("packed_bytes", "cache_bytes")},
            **{key: round(self.first[key], 3) for key in ("load_s", "import_s")},
        }


def size_of(model: Path) -> int:
    """Bytes of a model's file, or of the weight files in its directory."""
    return sum(file.stat().st_size for file in ([model] if model.is_file() else model.glob("*.safetensors")))


def ours(model: Path, scheme: str, work: Path) -> Path:
    out = work / scheme
    note(f"quantizing to {scheme}")
    command = [sys.executable, "-m", "pennyweight.cli.main", "quantize", model, "--out", out, "--json", "--scheme",
               scheme, "--at", HEAD, "--solver", "nearest", "--fit", "minmax", "--verify", "none"]  # fmt: skip
    measure(command, environment=project_environment())
    return out


def peers(model: Path, work: Path) -> dict[str, Path]:
    """Files of each of KINDS."""
    floats = work / "floats.gguf"
    note("converting for llama.cpp")
    measure([sys.executable, _CONVERT, llama_tools.converter(), model, floats], environment=project_environment())
    files = {}
    for kind in KINDS:
        note(f"quantizing to {kind}")
        files[kind] = work / f"{kind}.gguf"
        llama_tools.run_tool("llama-quantize", *_NO_TOKENIZER, floats, files[kind], kind, THREADS)
    floats.unlink()
    return files


def first_load(model: Path, context: int) -> float:
    """Seconds of a load that has to pack; it leaves the packed weights behind."""
    contestant = Contestant.start(f"{model.name}, first load", "ours", model, context)
    contestant.stop()
    if not contestant.first["is_fresh"]:
        raise CommandError(f"{model.name}: the first load found packed weights; remove them")
    return float(contestant.first["load_s"])


def race(contestants: Sequence[Contestant], reader: Contestant, rounds: int, prompt: int, decode: int) -> None:
    """Each writes once a round, in turn, beginning with another one each time; a round before that warms up."""
    for contestant in contestants:
        contestant.ask(prompt, 1)
    for number in range(rounds):
        start = number % len(contestants)
        for contestant in [*contestants[start:], *contestants[:start]]:
            time.sleep(_PAUSE_S)
            contestant.read_bytes_per_s.append(reader.ask(0, 0)["bytes_per_s"])
            time.sleep(_PAUSE_S)
            answer = contestant.ask(prompt, decode)
            contestant.answers.append(answer)
            speeds = f"{prompt / answer['prompt_s']:.1f} and {decode / answer['decode_s']:.1f} tokens/s"
            note(f"  {contestant.name}: {speeds}")


def ratios(contestants: Sequence[Contestant]) -> list[dict[str, Any]]:
    """Of ours to each of llama.cpp's: how many times as fast, medians of each round's."""
    found = []
    for one in contestants:
        for other in contestants:
            if one.kind != PEER and other.kind == PEER:
                rounds = list(zip(one.answers, other.answers, strict=True))
                speeds = {
                    what: statistics.median(b[f"{what}_s"] / a[f"{what}_s"] for a, b in rounds)
                    for what in ("prompt", "decode")
                }
                found.append({"ours": one.name, "peer": other.name, **{k: round(v, 3) for k, v in speeds.items()}})
    return found


def as_markdown(figures: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> str:
    head = ["", "prompt tokens/s", "decode tokens/s", "read GB/s", "model MiB", "packed MiB", "resident MiB",
            "of it mapped", "peak MiB", "load s", "first load s"]  # fmt: skip
    rows = [
        [one["name"],
         f"{one['prompt_tokens_per_s']:.1f}", f"{one['decode_tokens_per_s']:.2f}",
         f"{one['read_gb_per_s']:.1f}", mib(one["model_bytes"]),
         mib(one["cache_bytes"]) if "cache_bytes" in one else "",
         mib(one["resident_bytes"]), mib(one["of_files_bytes"]), mib(one["peak_bytes"]), f"{one['load_s']:.2f}",
         f"{one['first_load_s']:.2f}" if "first_load_s" in one else ""]
        for one in figures
    ]  # fmt: skip
    compared = [[one["ours"], one["peer"], f"{one['prompt']:.2f}", f"{one['decode']:.2f}"] for one in found]
    return f"{table(head, rows)}\n\n{table(['times as fast', 'as', 'prompt', 'decode'], compared)}\n"


def _wanted(files: Mapping[str, Path], directories: Mapping[str, Path]) -> list[tuple[str, str, Path | None]]:
    """Names, kinds and models of all contestants, and of the streaming read, the first."""
    wanted: list[tuple[str, str, Path | None]] = [("streaming read", "read", None)]
    wanted += [(f"{PEER} {kind}", PEER, file) for kind, file in files.items()]
    for scheme, directory in directories.items():
        wanted.append((f"{scheme}, int8", "ours", directory))
        wanted.append((f"{scheme}, exact", "exact", directory))
    first = next(iter(directories.items()), None)
    if first is not None:
        wanted.append((f"{first[0]}, int8, generate", "generate", first[1]))
    return wanted


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Make the files, load them and let them race."""
    prompt, decode = arguments.prompt, arguments.decode
    context = prompt + decode + 1
    model = Bench(arguments.checkpoints or cache("synthetic"), work).checkpoint(arguments.blocks)
    files = {} if arguments.ours_only else peers(model, work)
    directories = {} if arguments.peer_only else {scheme: ours(model, scheme, work) for scheme in SCHEMES}
    first_loads = {}
    for directory in directories.values():
        read_all(directory)
        first_loads[directory] = first_load(directory, context)
    started: list[Contestant] = []
    try:
        for name, kind, path in _wanted(files, directories):
            started.append(Contestant.start(name, kind, path, context))
        reader, *contestants = started
        race(contestants, reader, arguments.rounds, prompt, decode)
    finally:
        for contestant in started:
            contestant.stop()
    figures = []
    for contestant in contestants:
        packing = {"first_load_s": round(first_loads[contestant.model], 3)} if contestant.model in first_loads else {}
        figures.append({**contestant.figure(prompt, decode), **packing})
    rounds = {one.name: one.answers for one in contestants}
    return {"figures": figures, "ratios": ratios(contestants), "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--ours-only", action="store_true")
    only.add_argument("--peer-only", action="store_true")
    parser.add_argument("--checkpoints", type=Path, help="where they are kept (default: benchmarks/.cache/synthetic)")
    parser.add_argument("--out", type=Path, help="JSON to write, .md beside it")
    arguments = parser.parse_args()
    if not arguments.ours_only and (absent := llama_tools.why_not()):
        sys.exit(absent)
    facts = circumstances("benchmarks.model")
    facts["versions"] |= {} if arguments.ours_only else llama_tools.versions()
    work = Path(tempfile.mkdtemp(dir=cache(), prefix="model-"))
    try:
        found = run(arguments, work)
    finally:
        shutil.rmtree(work)
    notes = [
        f"- {arguments.blocks} blocks, one sequence, {THREADS} threads each: {arguments.prompt} tokens of prompt, then",
        f"  {arguments.decode} of text. Ours with the head in {HEAD.partition('=')[2]} and embeddings in bfloat16,",
        "  llama.cpp's as llama-quantize has them: the head in Q6_K, embeddings in the type of the rest.",
        "- Peak includes loading. The first load packs the weights and keeps them beside the model.",
        "- The streaming read is of the seconds before each text.",
    ]
    markdown = "\n".join([
        heading("A whole model", facts), as_markdown(found["figures"], found["ratios"]), *notes, ""
    ])  # fmt: skip
    save("model", {**facts, **found}, markdown, out=arguments.out)


if __name__ == "__main__":
    main()
