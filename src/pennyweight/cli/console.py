"""What every command shares: messages on standard error, JSON on standard output, progress on a terminal."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pennyweight.evaluate.loss_budget import Trial


def say(message: str) -> None:
    """A line for the user, on standard error."""
    print(message, file=sys.stderr, flush=True)


def put_json(value: Any) -> None:
    """`value` as the one JSON object on standard output; numbers that JSON lacks become null."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    print(json.dumps(_finite(plain), indent=2, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def device_of(name: str) -> str:
    """The torch device for --device: "auto" is the GPU where there is one. Raises UsageError."""
    import torch

    from pennyweight.core.errors import UsageError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name}: not a device; give auto, cpu or cuda")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: no such GPU was found; give auto or cpu")
    return name


def set_jobs(jobs: int | None) -> None:
    """Threads for --jobs; results never depend on it."""
    import torch

    if jobs is not None:
        torch.set_num_threads(jobs)


class Clock:
    """Time taken and time left, from the share of the work that is done."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def line(self, done: int, total: int) -> str:
        taken = time.perf_counter() - self._started
        left = taken / done * (total - done) if done else 0.0
        return f"{_minutes(taken)}, {_minutes(left)} left" if done < total else _minutes(taken)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Bar:
    """A progress bar with an estimate, drawn on a terminal only."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._clock = Clock()
        self._is_shown = sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        if not self._is_shown:
            return
        filled = 30 * done // max(total, 1)
        end = "\n" if done == total else ""
        text = (
            f"\r{self._label} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}  {self._clock.line(done, total)}  "
        )
        print(text, end=end, file=sys.stderr, flush=True)


def cost_teller() -> Callable[[int, int], None]:
    """Shows how far the measuring of costs is: a line at its end, and a bar on a terminal."""
    clock, bar = Clock(), Bar("costs")

    def tell(done: int, total: int) -> None:
        bar.show(done, total)
        if done == total:
            say(f"costs measured  [{clock.line(done, total)}]")

    return tell


def trial_teller() -> Callable[[Trial], None]:
    """A line for each plan that was tried for a budget of loss."""

    def tell(trial: Trial) -> None:
        failed = "may hold, more to judge on would tell" if trial.is_open else "loses too much"
        verdict = "holds" if trial.holds else failed
        found = f"loss {trial.loss:.4g}, at most {trial.upper:.4g}"
        metric = "" if trial.metric is None else f"metric {trial.metric:.4g} after {trial.original:.4g}, "
        state = "  (from an earlier run)" if trial.resumed else ""
        say(f"trial: {mebibytes(trial.size_bytes)} of tensors: {metric}{found}: {verdict}{state}")

    return tell


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; the first column is text, the others are right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"
