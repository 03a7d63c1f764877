"""Models in turns: each in its process, with a reading of memory before and after it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pennyweight.evaluate.speed.base import Asked
from pennyweight.evaluate.speed.entry import Entry
from pennyweight.evaluate.speed.process import Process
from pennyweight.evaluate.speed.results import Contestant, spread_of

# Passes over the memory that one reading is the median of.
_PASSES = 3
# What only packed weights have.
_OF_PACKED = ("kernels", "rounding", "packed", "packed_bytes", "decoded", "notes", "cache", "cache_bytes")


@dataclass(frozen=True)
class Burst:
    """One text: seconds to its first token, from there to its last one, and what reading memory gave around it."""

    first_s: float
    decode_s: float
    read_bytes_per_s: float


class Racer:
    """A model in its process, warm: it has written a text."""

    def __init__(self, stack: ExitStack, entry: Entry, asked: Asked, *, prompt: int, tokens: int) -> None:
        self.bursts: list[Burst] = []
        self._entry, self._asked = entry, asked
        self._question = {"prompt": prompt, "tokens": tokens}
        self._first_load_s: float | None = None
        self.process = stack.enter_context(Process(entry.kind, entry.path, asked))
        if self._has_packed():
            # Another process, so that neither the memory nor the time of packing is in its figures.
            self._first_load_s = self.process.ready["load_s"]
            self.process.close()
            self.process = stack.enter_context(Process(entry.kind, entry.path, asked))
        self._cold_s: float = self.process.ask(**self._question)["first_s"]

    def _has_packed(self) -> bool:
        facts = self.process.ready["facts"]
        return bool(facts.get("is_fresh") and facts["cache"])

    def run(self, read: Callable[[], float], before: float) -> float:
        """Write a text more; `read` memory after it, as `before` it; what that gave."""
        seconds = self.process.ask(**self._question)
        after = read()
        self.bursts.append(Burst(**seconds, read_bytes_per_s=(before + after) / 2))
        return after

    def result(self) -> Contestant:
        """What was found; its process touches every weight for that."""
        ready, end = self.process.ready, self.process.ask(end=True)
        facts: dict[str, Any] = dict.fromkeys(_OF_PACKED) | ready["facts"]
        size: int = end["bytes_per_token"]
        rates = [self._question["tokens"] / burst.decode_s for burst in self.bursts]
        return Contestant(
            model=self._entry.name, runtime=self._entry.kind, kernels=facts["kernels"],
            activations=self._asked.activations if self._entry.kind == "packed" else None, rounding=facts["rounding"],
            packed=facts["packed"] or 0, packed_bytes=facts["packed_bytes"] or 0, decoded=facts["decoded"] or {},
            notes=facts["notes"] or [], size_bytes=self._entry.size_bytes, cache=facts["cache"],
            cache_bytes=facts["cache_bytes"] or 0, import_s=ready["import_s"], load_s=ready["load_s"],
            first_load_s=self._first_load_s, cold_first_token_s=ready["import_s"] + ready["load_s"] + self._cold_s,
            first_token_s=spread_of(burst.first_s for burst in self.bursts),
            prompt_tokens_per_s=spread_of(self._question["prompt"] / burst.first_s for burst in self.bursts),
            decode_tokens_per_s=spread_of(rates), decode_bytes_per_s=spread_of(size * rate for rate in rates),
            share=spread_of(
                size * rate / burst.read_bytes_per_s for rate, burst in zip(rates, self.bursts, strict=True)
            ),
            **{name: end[name] for name in ("bytes_per_token", "resident_bytes", "mapped_bytes", "peak_bytes")},
            libraries_bytes=ready["libraries_bytes"],
        )  # fmt: skip


def race(racers: Sequence[Racer], memory: Process, rounds: int, tell: Callable[[int, int], None]) -> list[float]:
    """Let all write in turns, in the other order every other round; what reading memory gave, in bytes a second."""
    readings: list[float] = []

    def read() -> float:
        readings.append(memory.ask(read=_PASSES)["bytes_per_s"])
        return readings[-1]

    for number in range(rounds):
        before = read()
        for racer in racers[:: -1 if number % 2 else 1]:
            before = racer.run(read, before)
        tell(number + 1, rounds)
    return readings


def speed_ratios(one: Racer, other: Racer) -> dict[str, float]:
    """`one` / `other` of tokens a second: the median over the rounds, in each of which both ran."""
    pairs = list(zip(one.bursts, other.bursts, strict=True))
    return {
        "prompt_tokens_per_s": statistics.median(theirs.first_s / ours.first_s for ours, theirs in pairs),
        "decode_tokens_per_s": statistics.median(theirs.decode_s / ours.decode_s for ours, theirs in pairs),
    }
