"""What the runners of all peers share: the command line, the clock, the answer.

Run by the Python of a peer's own environment; imports nothing of Pennyweight, and of others only what all have.

    python -m benchmarks.peers.NAME.run MODEL OUT --scheme int4-g128 --solver gptq [--tokens FILE.safetensors]

The file of calibration tokens holds `input_ids`, int64 [windows, length], or [tokens] with the `lengths` of the windows
that they are of. The answer is one JSON object, the last line of stdout; whatever a library prints goes to stderr.
Where a library does not take a model or a scheme, the answer holds its message under "refused".
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import contextlib
import importlib.metadata
import json
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Beside a dense artefact: {"bytes": {tensor: what it takes packed}} for the tensors that were quantized.
STORAGE_NAME = "storage.json"


@dataclass(frozen=True)
class WeightScheme:
    """An integer scheme; `group` is None for one scale per output channel.

    `zero` is "none" (symmetric), "integer" (zero points in as many bits as a code) or "float16" (an offset for each
    group).
    """

    bits: int
    group: int | None
    zero: str

    @classmethod
    def parse(cls, name: str) -> WeightScheme:
        """Read `int4-g128`, `int3-g32-asym`, `int4-g64-offset` or `int8-channel`."""
        match = re.fullmatch(r"int([2-8])-(?:g([1-9]\d*)|channel)(-asym|-offset)?", name)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no scheme; write intN-gG or intN-channel, N from 2 to 8, and -asym or -offset after it"
            )
        bits, group, zero = match.groups()
        kinds = {None: "none", "-asym": "integer", "-offset": "float16"}
        return cls(bits=int(bits), group=int(group) if group else None, zero=kinds[zero])

    @property
    def is_symmetric(self) -> bool:
        return self.zero == "none"

    def holds(self, columns: int) -> bool:
        """Whether the groups divide a weight of so many columns."""
        return self.group is None or columns % self.group == 0

    def storage_bytes(self, rows: int, columns: int, *, scale_bits: int = 16) -> int:
        """Bytes of the codes, scales and zero points of a weight, each packed without padding but for the last byte."""
        groups = rows * (1 if self.group is None else columns // self.group)
        zero_bits = {"none": 0, "integer": self.bits, "float16": 16}[self.zero]
        return sum(-(-bits // 8) for bits in (rows * columns * self.bits, groups * scale_bits, groups * zero_bits))


@dataclass
class Clock:
    """Seconds of each phase."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        yield
        self.phases[name] = round(time.perf_counter() - start, 2)


def indivisible(widths: Mapping[str, int], scheme: WeightScheme) -> list[str]:
    """The linears, name -> input width, that the group size does not divide; raises ValueError if that leaves none."""
    refused = [name for name, width in widths.items() if not scheme.holds(width)]
    if len(refused) == len(widths):
        raise ValueError(
            f"groups of {scheme.group} divide none of the input widths {sorted(set(widths.values()))}; "
            "use a group size that divides them"
        )
    return refused


def load_model(path: Path, **options: Any) -> Any:
    """The model with the class that its config names: a decoder with its head, an encoder without one."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    return getattr(transformers, config.architectures[0]).from_pretrained(path, **options)


def linear_widths(model: Any) -> dict[str, int]:
    """Input widths of the linears in the model's blocks; output head and pooler, which stay in float, left out."""
    from torch import nn

    return {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)
    }


def write_storage(out: Path, bytes_of: Mapping[str, int]) -> None:
    """Say what the decoded tensors of the artefact `out` take where they are packed."""
    (out / STORAGE_NAME).write_text(json.dumps({"bytes": dict(bytes_of)}, indent=2) + "\n", encoding="utf-8")


def parse_arguments(description: str, solvers: Mapping[str, bool]) -> argparse.Namespace:
    """The command line; `solvers` name -> whether it takes calibration tokens."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("out", type=Path, help="directory to write; must not exist, or be empty")
    parser.add_argument("--scheme", type=WeightScheme.parse, required=True, help="int4-g128, int3-g32-asym, ...")
    parser.add_argument("--solver", choices=tuple(solvers), required=True)
    parser.add_argument("--tokens", type=Path, help="safetensors file with the calibration windows")
    arguments = parser.parse_args()
    if (arguments.tokens is not None) != solvers[arguments.solver]:
        takes = "needs" if solvers[arguments.solver] else "takes no"
        parser.error(f"--solver {arguments.solver} {takes} --tokens")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"{arguments.out} exists and is not an empty directory")
    return arguments


def answer(
    arguments: argparse.Namespace,
    quantize: Callable[[argparse.Namespace, Clock], dict[str, Any]],
    packages: Sequence[str],
) -> None:
    """Call `quantize`, which writes the artefact and returns what it has to say, and print the answer."""
    clock = Clock()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            said = quantize(arguments, clock)
        except (Exception, SystemExit) as error:
            # The message is the result: this library does not take this model or this scheme.
            traceback.print_exc()
            first_line = (str(error).strip() or "no message").splitlines()[0]
            said = {"refused": f"{type(error).__name__}: {first_line}"}
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(
        json.dumps(
            {**said, "phase_seconds": clock.phases, "versions": {"python": platform.python_version(), **versions}}
        )
    )
