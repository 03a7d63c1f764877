r"""Quantize a model with llm-compressor as its user would, and print what it took as one JSON object.

Run by the Python of this peer's own environment (`make peers`); imports nothing of Pennyweight.

    .venvs/llm-compressor/bin/python benchmarks/peers/llm_compressor/run.py \
        MODEL OUT --scheme int4-g128 --solver gptq --tokens FILE.safetensors

The file of calibration tokens holds `input_ids`, int64 [windows, length]. Everything not on the command line is the
library's default: checkpoint dtype, min-max scales, 1 % damping, columns in blocks of 128, sequential calibration; the
output head stays in float. Progress goes to stderr; the JSON is the last line of stdout.
"""

from __future__ import annotations

import os
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import contextlib
import importlib.metadata
import json
import platform
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

REPORTED_PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")
IGNORED = ("lm_head",)


@dataclass(frozen=True)
class WeightScheme:
    """A symmetric or asymmetric integer scheme; `group` is None for one scale per output channel."""

    bits: int
    group: int | None
    is_symmetric: bool

    @classmethod
    def parse(cls, name: str) -> WeightScheme:
        """Read `int4-g128`, `int3-g32-asym` or `int8-channel`."""
        match = re.fullmatch(r"int([2-8])-(?:g([1-9]\d*)|channel)(-asym)?", name)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no scheme; write intN-gG, intN-channel, or either with -asym, N from 2 to 8"
            )
        bits, group, asymmetric = match.groups()
        return cls(bits=int(bits), group=int(group) if group else None, is_symmetric=asymmetric is None)

    def holds(self, columns: int) -> bool:
        """Whether the groups divide a weight of so many columns."""
        return self.group is None or columns % self.group == 0


class Clock:
    """Seconds of each phase, and since the process began."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {"imports": seconds_since_process_start()}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        yield
        self.phases[name] = time.perf_counter() - start


def seconds_since_process_start() -> float:
    """Age of this process, the start of the interpreter included; Linux, 10 ms resolution."""
    # Field 22 of proc_pid_stat(5); the command name before it may hold spaces, but ends with the last ")".
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    started = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_memory_bytes() -> int:
    """Largest resident memory so far, mapped file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_seconds() -> float:
    """Processor time of all threads so far: far above `seconds` x threads' share when the machine is contended."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def indivisible_layers(model: nn.Module, scheme: WeightScheme) -> list[str]:
    """The linears whose input width the group size does not divide; the library refuses to quantize them.

    Raises ValueError if that leaves none to quantize.
    """
    from torch import nn

    widths = {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in IGNORED
    }
    refused = [name for name, width in widths.items() if not scheme.holds(width)]
    if len(refused) == len(widths):
        raise ValueError(
            f"groups of {scheme.group} divide none of the input widths {sorted(set(widths.values()))}; "
            "use a group size that divides them"
        )
    return refused


def make_modifier(scheme: WeightScheme, *, solver: str, actorder: str | None, ignore: list[str]) -> Any:
    """The library's recipe for `scheme`: its own W{bits}A16 preset, with this group size and symmetry."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.is_symmetric,
        strategy="channel" if scheme.group is None else "group",
        group_size=scheme.group,
    )
    options: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ignore,
    }
    if solver == "nearest":
        return QuantizationModifier(**options)
    if actorder is not None:
        options["actorder"] = None if actorder == "none" else actorder
    return GPTQModifier(**options)


def calibration_loader(tokens: Path) -> DataLoader[dict[str, Any]]:
    """One window a batch, in the order of the file, as it is: no padding, no truncation, no shuffling."""
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader

    windows = load_file(tokens)["input_ids"]
    samples = [{"input_ids": window, "attention_mask": window.new_ones(window.shape)} for window in windows]
    return DataLoader(cast("Dataset[dict[str, Any]]", samples), batch_size=1)


def quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the library from the imports to the saved model."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clock = Clock()
    with clock.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with clock.phase("quantize"):
        in_float = indivisible_layers(model, arguments.scheme)
        modifier = make_modifier(
            arguments.scheme, solver=arguments.solver, actorder=arguments.actorder, ignore=[*IGNORED, *in_float]
        )
        if arguments.solver == "gptq":
            oneshot(model=model, processor=tokenizer, recipe=modifier, dataset=calibration_loader(arguments.tokens))
        else:
            oneshot(model=model, processor=tokenizer, recipe=modifier)
    with clock.phase("save"):
        model.save_pretrained(arguments.out, save_compressed=True)
        tokenizer.save_pretrained(arguments.out)

    resolved = modifier.resolved_config.config_groups["group_0"].weights
    return {
        "tool": "llm-compressor",
        "model": str(arguments.model),
        "out": str(arguments.out),
        "scheme": asdict(arguments.scheme),
        "solver": arguments.solver,
        "seconds": seconds_since_process_start(),
        "phase_seconds": clock.phases,
        "cpu_seconds": cpu_seconds(),
        "peak_memory_bytes": peak_memory_bytes(),
        "size_bytes": sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file()),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "observer": resolved.observer,
        "actorder": str(getattr(resolved.actorder, "value", resolved.actorder)),
        # llm-compressor stops with a ValueError that says to add these to `ignore`; this runner does as told.
        "left_in_float": {"indivisible by the group size": in_float, "ignored by choice": list(IGNORED)},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in REPORTED_PACKAGES},
        },
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quantize a model with llm-compressor and report time and memory.")
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("out", type=Path, help="directory to write; must not exist, or be empty")
    parser.add_argument("--scheme", type=WeightScheme.parse, required=True, help="int4-g128, int3-g32-asym, ...")
    parser.add_argument("--solver", choices=("nearest", "gptq"), required=True)
    parser.add_argument("--tokens", type=Path, help="safetensors file with the calibration windows, for gptq")
    parser.add_argument("--actorder", choices=("weight", "static", "none"), help="gptq only (default: the library's)")
    arguments = parser.parse_args()
    if (arguments.tokens is not None) != (arguments.solver == "gptq"):
        parser.error("--tokens goes with --solver gptq, and only with it")
    if arguments.actorder is not None and arguments.solver != "gptq":
        parser.error("--actorder goes with --solver gptq")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"{arguments.out} exists and is not an empty directory")
    return arguments


def main() -> None:
    """Quantize; whatever the library prints on stdout goes to stderr, so that stdout holds the result alone."""
    arguments = parse_arguments()
    with contextlib.redirect_stdout(sys.stderr):
        result = quantize(arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
