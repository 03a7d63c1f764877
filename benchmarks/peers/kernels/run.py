"""Time everybody's kernels on one shape and width, taking turns.

    python -m benchmarks.peers.kernels.run --shape 4096x4096 --bits 4 --tokens 1 8 128 512 --rounds 9

Every round each contestant multiplies with all of its weights, once, right after a streaming read. Nothing begins
before the threads of the one before have gone to sleep: they spin for a while when their work is done. Outcomes are
compared with the decoded weights first. The answer is one JSON object, the last line of stdout: for each number of
tokens and contestant its facts, its error, the bytes it stores, and for each round the seconds of one product and the
bytes a second of the reading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.kernels import ggml, onnxruntime_nodes, openvino_graphs, ours, torch_linears
from benchmarks.peers.kernels.contest import THREADS, Contestant, Size
from pennyweight.evaluate.speed.machine import cache_bytes

PEERS = (ggml, onnxruntime_nodes, openvino_graphs, torch_linears)
# What a rotation holds at least: several times most last-level caches, and as much as this machine's.
ROTATION_BYTES = max(128 << 20, cache_bytes() or 0)
# From so many tokens on the weights are a small part of the work: two, cold because the reading came before them.
MANY_TOKENS, FEW_WEIGHTS = 128, 2
# Of outcomes to products with the decoded weights; what rounding activations to 8 bits as a whole may cost.
LARGEST_ERROR = 0.02
# Products of few tokens are over soon, and memory changes its speed between two of them: rounds times so many.
_FEW_TIMES = 4
_LONGEST_PAUSE, _NAP, _BUSY_SHARE = 0.5, 2e-3, 0.2


@dataclass
class Timed:
    """A contestant at one number of tokens; a reading and a product for each round."""

    contestant: Contestant
    count: int
    error: float
    seconds: list[float] = field(default_factory=list)
    read_bytes_per_s: list[float] = field(default_factory=list)

    def answer(self) -> dict[str, Any]:
        return {
            **asdict(self.contestant.facts),
            "weights": self.count,
            "error": self.error,
            "seconds": self.seconds,
            "read_bytes_per_s": self.read_bytes_per_s,
        }


class Cell:
    """All contestants of a shape and width, or those whose names have one of the words `only` in them."""

    def __init__(self, rows: int, cols: int, bits: int, only: Sequence[str]) -> None:
        self._rows, self._cols, self._bits, self._only = rows, cols, bits, only
        self._neutral = torch.ones(ROTATION_BYTES, dtype=torch.uint8)
        self.failures: dict[str, str] = {}

    def times(self, tokens: Sequence[int], rounds: int) -> dict[int, list[dict[str, Any]]]:
        """Of every contestant that multiplies correctly, for each number of tokens; the others are in `failures`."""
        answers = {}
        for is_many in (False, True):
            some = [number for number in tokens if (number >= MANY_TOKENS) == is_many]
            contestants = list(self._contestants(is_many)) if some else []
            for number in some:
                answers[number] = self._times(contestants, number, rounds if is_many else _FEW_TIMES * rounds)
        return answers

    def _times(self, contestants: Sequence[tuple[Contestant, int]], tokens: int, rounds: int) -> list[dict[str, Any]]:
        x = torch.randn(tokens, self._cols, generator=torch.Generator().manual_seed(1))
        timed = [one for contestant, count in contestants if (one := self._checked(contestant, count, x))]
        for number in range(rounds):
            start = number % len(timed)
            for one in timed[start:] + timed[:start]:
                self._round(one)
        return [one.answer() for one in timed]

    def _contestants(self, is_many: bool) -> Iterator[tuple[Contestant, int]]:
        count = FEW_WEIGHTS if is_many else -(-ROTATION_BYTES * 8 // (self._rows * self._cols * self._bits))
        size = Size(self._rows, self._cols, count)
        for contestant in self._of_width(size, self._bits, (ours, *PEERS)):
            yield contestant, count
        if is_many:
            # Whatever our width: the fastest way to multiply by weights of 4 or 8 bits.
            for bits in {4, 8} - {self._bits}:
                for contestant in self._of_width(size, bits, PEERS):
                    if contestant.facts.mode == "int8":
                        yield contestant, count
        halves = replace(size, count=max(FEW_WEIGHTS, count * self._bits // 16))
        yield torch_linears.unquantized(halves), halves.count

    def _of_width(self, size: Size, bits: int, makers: Sequence[ModuleType]) -> Iterator[Contestant]:
        for maker in makers:
            for contestant in maker.contestants(size, bits):
                if not self._only or any(word in contestant.facts.name for word in self._only):
                    yield contestant

    def _checked(self, contestant: Contestant, count: int, x: Tensor) -> Timed | None:
        name = contestant.facts.name
        contestant.take(x)
        contestant.run()
        expected = x @ contestant.decoded().T
        errors = [float((contestant.outcome(i) - expected).norm() / expected.norm()) for i in (0, count - 1)]
        if not max(errors) <= LARGEST_ERROR:
            self.failures[name] = f"relative error {max(errors):.3f}"
            return None
        contestant.run()
        print(f"    {x.shape[0]} tokens, {name}: {count} weights, error {max(errors):.4f}", file=sys.stderr, flush=True)
        return Timed(contestant, count, round(max(errors), 6))

    def _round(self, one: Timed) -> None:
        sizes = sum(part.nbytes for part in one.contestant.memory)
        memory = one.contestant.memory if sizes >= ROTATION_BYTES else [self._neutral]
        settle()
        seconds = _seconds(lambda: [ours.stream_read(part) for part in memory])
        one.read_bytes_per_s.append(round(sum(part.nbytes for part in memory) / seconds))
        settle()
        one.seconds.append(round(_seconds(one.contestant.run) / one.count, 8))


def settle() -> None:
    """Wait until no thread of this process runs."""
    end = time.perf_counter() + _LONGEST_PAUSE
    while time.perf_counter() < end:
        before, used = time.perf_counter(), time.process_time()
        time.sleep(_NAP)
        if time.process_time() - used < _BUSY_SHARE * (time.perf_counter() - before):
            return


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", required=True, help="ROWSxCOLS")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="contestants whose name has one of these in it")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows, cols = map(int, arguments.shape.split("x"))
    with contextlib.redirect_stdout(sys.stderr), torch.inference_mode():
        cell = Cell(rows, cols, arguments.bits, arguments.only)
        times = cell.times(arguments.tokens, arguments.rounds)
    versions = {
        "torch": torch.__version__,
        **onnxruntime_nodes.versions(),
        **openvino_graphs.versions(),
        **ggml.versions(),
    }
    print(json.dumps({"times": times, "failures": cell.failures, "versions": versions}))


if __name__ == "__main__":
    main()
