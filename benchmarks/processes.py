"""Running a command as a process of its own and measuring the whole of it: seconds, processor time, peak memory.

On Linux the peak that a process reports begins with the memory of whoever started it, so a large benchmark process
would be counted as part of a small child. This file is therefore also a small program that starts the command and
measures it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LOG_TAIL = 2000


class CommandError(RuntimeError):
    """A measured command failed; the message ends with what it said last."""


@dataclass(frozen=True)
class Measured:
    """A finished command: what it printed, wall seconds from start to end, seconds of all its threads, and the largest
    resident memory of any of its processes (mapped file pages included)."""

    stdout: str
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


def measure(command: Sequence[object], *, environment: Mapping[str, str] | None = None) -> Measured:
    """Run `command` (words and paths) to its end; raises CommandError with what it said last if it fails."""
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch, "log"), "w+b") as log:
        result = Path(scratch, "result.json")
        launcher = [sys.executable, "-I", "-S", __file__, str(result), *words]
        done = subprocess.run(launcher, stdout=subprocess.PIPE, stderr=log, env=environment, check=False)
        if done.returncode:
            log.seek(0)
            said = log.read().decode(errors="replace")[-_LOG_TAIL:]
            raise CommandError(f"{' '.join(words[:4])} ... ended with {done.returncode}:\n{said}")
        return Measured(stdout=done.stdout.decode(), **json.loads(result.read_text(encoding="utf-8")))


def _launch(result: str, command: list[str]) -> int:
    started = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    figures = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * unit,
    }
    Path(result).write_text(json.dumps(figures), encoding="utf-8")
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_launch(sys.argv[1], sys.argv[2:]))
