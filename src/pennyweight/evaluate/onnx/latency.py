"""How long two files take for the same inputs, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pennyweight.containers.onnx import Runtime
from pennyweight.evaluate.onnx.runtime import Array, opened

_WARM_UP, _LEAST, _MOST = 3, 5, 200
# Below this share of the difference of two medians is noise of the machine.
NOISE = 0.05


@dataclass(frozen=True)
class Latency:
    """Medians of `runs` runs of each file in `runtime`, in turns, on `threads` threads (0: as many as it takes)."""

    runtime: str
    float_ms: float
    quantized_ms: float
    runs: int
    threads: int
    batch: int

    @property
    def ratio(self) -> float:
        """Time of the quantized file over that of the float one."""
        return self.quantized_ms / self.float_ms

    @property
    def warning(self) -> str | None:
        """What to tell where quantization made it slower."""
        if self.ratio <= 1 + NOISE:
            return None
        return (
            f"{self.runtime}: the quantized file takes {self.quantized_ms:.3g} ms a run, {self.ratio:.2f} times as "
            f"long as the float file ({self.float_ms:.3g} ms) at a batch of {self.batch}: it is smaller, but not faster"
        )


def latency(
    float_path: Path, quantized_path: Path, arrays: Mapping[str, Array], *, runtime: Runtime = "onnxruntime",
    threads: int = 0, seconds: float = 3.0,
) -> Latency:  # fmt: skip
    """Run both files in turns, for about `seconds` together, each with the settings that the runtime has by itself."""
    files = [opened(path, runtime, threads=threads, is_exact=False) for path in (float_path, quantized_path)]
    ways: list[Callable[[], object]] = [lambda file=file: file(arrays) for file in files]  # type: ignore[misc]
    times = in_turns(ways, seconds=seconds)
    before, after = (1e3 * median(some) for some in times)
    batch = next((int(array.shape[0]) for array in arrays.values() if array.ndim), 1)
    return Latency(files[1].version, before, after, len(times[0]), threads, batch)


def in_turns(ways: list[Callable[[], object]], *, seconds: float) -> list[list[float]]:
    """Seconds of each run of each of `ways`: first all once, then all again, so that a busy machine slows all alike."""
    for way in ways * _WARM_UP:
        way()
    times: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + seconds
    while len(times[0]) < _LEAST or (time.perf_counter() < end and len(times[0]) < _MOST):
        for way, some in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            some.append(time.perf_counter() - start)
    return times
