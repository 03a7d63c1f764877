"""Milliseconds that ONNX Runtime takes for one input, of all files of a network in one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.vision.feeds import fed, names_of
from benchmarks.vision.problem import Arrays

THREADS = (1, 2)
# A file has its turn for so long in each round, and at least so many times.
_TURN_SECONDS, _LEAST = 0.15, 3


@dataclass(frozen=True)
class Latency:
    """milliseconds   median over rounds of the median of a turn
    ratio          the median over rounds of that turn / the float file's in the same round
    """

    milliseconds: float
    ratio: float


def latencies(files: Mapping[str, Path], inputs: Arrays, *, threads: int, rounds: int, reference: str
              ) -> dict[str, Latency]:  # fmt: skip
    """Of each of `files` with `inputs`, which hold a batch of 1; `reference` names the one that ratios are to."""
    sessions = {name: _session(file, threads) for name, file in files.items()}
    feeds = {name: fed(names_of(session), inputs) for name, session in sessions.items()}
    turns: dict[str, list[float]] = {name: [] for name in files}
    for round_ in range(rounds):
        # Whoever comes after a slow file finds other caches: the order turns.
        order = list(files)[round_ % len(files) :] + list(files)[: round_ % len(files)]
        for name in order:
            turns[name].append(_turn(sessions[name], feeds[name]))
    return {name: _latency(times, turns[reference]) for name, times in turns.items()}


def _session(file: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _turn(session: Any, inputs: Arrays) -> float:
    """The median milliseconds of a turn; the first run, which finds cold caches, does not count."""
    session.run(None, inputs)
    times: list[float] = []
    while sum(times) < _TURN_SECONDS or len(times) < _LEAST:
        start = time.perf_counter()
        session.run(None, inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _latency(times: Sequence[float], reference: Sequence[float]) -> Latency:
    ratios = [one / other for one, other in zip(times, reference, strict=True)]
    return Latency(round(statistics.median(times), 4), round(statistics.median(ratios), 3))
