"""How much memory this process has needed, and how much the machine has left."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_CGROUP = Path("/sys/fs/cgroup")
# Of glibc's malloc.h; the threshold from which pieces come from the system by themselves is at its largest.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        # What getrusage says includes, on Linux, the peak of the process that started this one: the second choice.
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int:
    """What a new allocation may take without swapping; the free pages where the system does not say."""
    limits = [left for left in (_left_of_machine(), _left_of_container()) if left is not None]
    return min(limits) if limits else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_of_container() -> int | None:
    """Of a container with a limit (control groups, version 2): the limit less what is in use and not page cache."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    cache = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
    return None if limit == "max" else max(0, int(limit) - used + cache)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def keep_freed_memory() -> None:
    """Let freed memory serve the next allocation: for the start of a program, before it has threads.

    glibc hands large pieces back to the system when they are freed and keeps a heap for every thread; each block of a
    model then faults in the same gigabyte anew, a tenth of the time that GPTQ takes. One heap that is kept takes no
    more memory at its peak.
    """
    library = _libc()
    if library is not None and hasattr(library, "mallopt"):
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 1 << 25), (_M_TRIM_THRESHOLD, 1 << 30)):
            library.mallopt(parameter, value)


def give_back_memory() -> None:
    """Return freed memory to the system, for another process to use."""
    library = _libc()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def settle_imports() -> None:
    """Leave what has been imported out of the garbage collector's searches, and let it search what comes.

    A program that is about to import torch and transformers calls gc.disable() first: half a million objects that will
    never be garbage are otherwise searched again and again, for more than a second.
    """
    gc.freeze()
    gc.enable()


@contextmanager
def settled_imports() -> Iterator[None]:
    """Imports of a program that stay out of the garbage collector's searches, from the first one on."""
    gc.disable()
    try:
        yield
    finally:
        settle_imports()
