"""How exactly sizes are met, and what a second budget takes.

    python -m benchmarks.sizes [--models demo,stories260K,moe] [--timed [demo,llama]] [--data DIR] [--out FILE]

Ten sizes of the whole output, from the smallest that can be had to that in which all tensors take 8 bits a weight, each
written and measured. Whatever is left is room that no plan filled (the steps between plans), or was kept for what is
not known beforehand (notes of the record). The mixture of experts has random weights; transformers takes its experts in
one scheme alone. `--timed`: `pennyweight plan` of two budgets, one after the other, on the shipped model and on a
Llama of random weights, 4 blocks of TinyLlama's.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.processes import measure
from benchmarks.results_file import cache, circumstances, heading, note, options, project_environment, save, table
from benchmarks.subjects import DEMO
from pennyweight.core.errors import BudgetError
from pennyweight.pipeline.beside import output_bytes
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.prepare import prepare
from pennyweight.pipeline.run import quantize
from pennyweight.pipeline.sizes import weight_count
from pennyweight.plan.budget import Budget

_COUNT = 10
_EXPERTS = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_experts": 16,
    "num_experts_per_tok": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Met:
    """A size that was asked of the whole output, what was written of it and of its tensors, and what tensors might have
    taken (less what is kept for what is not known beforehand)."""

    asked: int
    written: int
    tensors: int
    room: int


def sizes(model: Path, work: Path) -> Iterator[Met]:
    """From the smallest to 8 bits of all tensors."""
    options = Options(solver="nearest", calibration="none")
    smallest = smallest_output(model, options)
    job = prepare(str(model), options, None)
    largest = weight_count(job.model) + output_bytes(job) - _tensor_bytes(job)
    for step in range(_COUNT):
        asked = int(smallest + step / (_COUNT - 1) * (largest - smallest))
        sized = replace(options, budget=Budget("size", asked))
        job = prepare(str(model), sized, None)
        tensors = _tensor_bytes(job)
        out = work / "sized"
        shutil.rmtree(out, ignore_errors=True)
        report = quantize(str(model), out, sized)
        yield Met(asked, report.size_bytes, tensors, tensors + asked - output_bytes(job))


def smallest_output(model: Path, options: Options) -> int:
    """Bytes of the smallest output that can be promised."""
    try:
        prepare(str(model), replace(options, budget=Budget("size", 1)), None)
    except BudgetError as error:
        return error.smallest
    raise RuntimeError(f"{model}: a plan of one byte")


def _tensor_bytes(job: Any) -> int:
    return sum(info.size_bytes for info in job.entries.values())


@dataclass(frozen=True)
class Timed:
    """Seconds, and seconds of the processor, of `pennyweight plan` with a first budget, which measures costs, and with
    a second one."""

    model: str
    weights: int
    first: tuple[float, float]
    second: tuple[float, float]


def timed(name: str, model: Path) -> Timed:
    """Two budgets of a model that has no costs yet."""
    shutil.rmtree(model / ".pennyweight", ignore_errors=True)
    took = []
    for bpw in (6.0, 7.0):
        words = [sys.executable, "-m", "pennyweight.cli.main", "plan", model, "--bpw", bpw, "--json"]
        done = measure(words, environment=project_environment())
        took.append((done.seconds, done.cpu_seconds))
        note(f"  {name} --bpw {bpw}: {done.seconds:.1f} s, {done.cpu_seconds:.1f} s of the processor")
    answer = json.loads(done.stdout)
    weights = round(8 * answer["size_bytes"] / answer["bpw"])
    return Timed(name, weights, *took)


def shipped(data: Path, work: Path) -> Path:
    """A copy of the shipped model without its costs."""
    return _copied(DEMO, work / "demo")


def stories(data: Path, work: Path) -> Path:
    """A copy of stories260K, whose own directory may be read-only."""
    return _copied(data / "models" / "stories260K", work / "stories")


def _copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    return target


def experts(data: Path, work: Path) -> Path:
    """A mixture of 16 experts in 4 blocks, random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    path = work / "moe"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**_EXPERTS)).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, path / name)
    return path


def llama(work: Path) -> Path:
    """A Llama of random weights, 4 blocks of TinyLlama's."""
    path = work / "llama"
    words = [sys.executable, "-m", "benchmarks.synthetic", str(path), "--blocks", "4"]
    subprocess.run(words, env=project_environment(), check=True)
    return path


MODELS: dict[str, Callable[[Path, Path], Path]] = {"demo": shipped, "stories260K": stories, "moe": experts}


def markdown(facts: dict[str, Any], met: dict[str, list[Met]], times: Sequence[Timed]) -> str:
    """The result to read."""
    parts = [heading("Sizes", facts)]
    head = ["asked", "written", "left", "tensors", "their room", "left"]
    for model, found in met.items():
        rows = [
            [f"{one.asked:,}", f"{one.written:,}", _left(one.written, one.asked), f"{one.tensors:,}", f"{one.room:,}",
             _left(one.tensors, one.room)]
            for one in found
        ]  # fmt: skip
        parts += [f"## {model}\n", table(head, rows), ""]
    if met:
        parts += [
            "- asked, written: bytes of the whole output.",
            "- room: what is asked less a bound for all that lies beside the tensors.\n",
        ]
    if times:
        rows = [
            [
                one.model,
                f"{one.weights:,}",
                *(f"{took[0]:.1f} ({took[1]:.1f})" for took in (one.first, one.second)),
                f"{one.second[0] / one.first[0]:.3f} ({one.second[1] / one.first[1]:.3f})",
            ]
            for one in times
        ]
        head = ["model", "weights", "first budget, s", "second, s", "ratio"]
        parts += [
            "## A second budget\n",
            table(head, rows),
            "\n- `pennyweight plan`, whole processes; in brackets seconds of the processor.\n",
        ]
    return "\n".join(parts)


def _left(taken: int, allowed: int) -> str:
    return f"{100 * (1 - taken / allowed):.2f} %"


def main() -> None:
    """Measure, print, save."""
    parser = options("sizes", "How exactly sizes are met.", MODELS)
    parser.add_argument(
        "--timed", nargs="?", const="demo,llama", default="", help="the time of a second budget too, on these models"
    )
    arguments = parser.parse_args()
    facts = circumstances("benchmarks.sizes")
    met: dict[str, list[Met]] = {}
    times: list[Timed] = []
    with tempfile.TemporaryDirectory(dir=cache(), prefix="sizes-") as directory:
        work = Path(directory)
        for name in filter(None, arguments.models.split(",")):
            model = MODELS[name](arguments.data, work)
            met[name] = []
            for one in sizes(model, work):
                met[name].append(one)
                note(f"  {name} {one}")
        for name in filter(None, arguments.timed.split(",")):
            title, made = ("Llama, 4 blocks", llama(work)) if name == "llama" else (name, _copied(DEMO, work / "timed"))
            times.append(timed(title, made))
    save("sizes", {**facts, "sizes": met, "times": times}, markdown(facts, met, times), out=arguments.out)


if __name__ == "__main__":
    main()
