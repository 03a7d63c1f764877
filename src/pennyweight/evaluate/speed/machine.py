"""The machine that is measured on: its caches, its memory, and how busy others keep it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pennyweight.core.memory import peak_memory_bytes

_CACHES = "/sys/devices/system/cpu/cpu{}/cache"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_STATUS = {"VmRSS": "resident_bytes", "RssFile": "mapped_bytes"}
# Fields of a line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal. The last is what other guests
# of the same machine took.
_BUSY = (0, 1, 2, 5, 6, 7)


def cache_bytes() -> int | None:
    """All last-level caches of the processors that this process may use; None where the system does not say."""
    if sys.platform != "linux":
        return None
    found: dict[tuple[int, str], int] = {}
    try:
        for number in os.sched_getaffinity(0):
            for entry in Path(_CACHES.format(number)).glob("index*"):
                level, shared_by, size = (_line(entry / name) for name in ("level", "shared_cpu_list", "size"))
                found[int(level), shared_by] = int(size[:-1]) * _UNITS[size[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or None


def _line(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()


def memory_facts() -> dict[str, int | None]:
    """Of this process: bytes that are resident, those mapped from files among them (which the system can drop), and the
    most that ever were; None where the system does not say."""
    found: dict[str, int | None] = dict.fromkeys(_STATUS.values())
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        lines = []
    for name, _, value in (line.partition(":") for line in lines):
        if name in _STATUS:
            found[_STATUS[name]] = int(value.split()[0]) * 1024
    return {**found, "peak_bytes": peak_memory_bytes()}


def load_average() -> list[float] | None:
    """Over 1, 5 and 15 minutes; None where the system does not say."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):
        return None


class Watch:
    """From its making on: how much of the machine others use."""

    def __init__(self) -> None:
        self._started, self._busy = time.perf_counter(), _busy_seconds()

    def others(self, own_seconds: float) -> float | None:
        """The share of all processors' time that was used by others than us, who used `own_seconds` of it."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        there = (time.perf_counter() - self._started) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (busy - self._busy - own_seconds) / there))


def _busy_seconds() -> float | None:
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        ticks = sum(int(fields[place]) for place in _BUSY)
    except (OSError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else None
