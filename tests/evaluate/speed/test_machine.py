"""What is said of the machine."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from pennyweight.evaluate.speed import machine
from pennyweight.evaluate.speed.memory import Memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")


def _cache(root: Path, cpu: int, index: int, level: int, size: str, shared_by: str) -> None:
    directory = root / f"cpu{cpu}" / f"index{index}"
    directory.mkdir(parents=True)
    for name, value in (("level", str(level)), ("size", size), ("shared_cpu_list", shared_by)):
        (directory / name).write_text(f"{value}\n")


@linux
def test_last_level_caches_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of processors, each pair with a cache of its own; a fifth that this process may not use."""
    for cpu, pair in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3"), (4, "4")):
        _cache(tmp_path, cpu, 0, 1, "48K", str(cpu))
        _cache(tmp_path, cpu, 3, 3, "32M", pair)
    monkeypatch.setattr(machine, "_CACHES", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert machine.cache_bytes() == 2 * 32 * 2**20
    monkeypatch.setattr(machine, "_CACHES", str(tmp_path / "none{}"))
    assert machine.cache_bytes() is None


@linux
def test_an_unreadable_cache_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _cache(tmp_path, 0, 0, 2, "much", "0")
    monkeypatch.setattr(machine, "_CACHES", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert machine.cache_bytes() is None


@linux
def test_memory_that_is_touched_is_resident() -> None:
    size = 64 << 20
    before = machine.memory_facts()["resident_bytes"]
    held = torch.ones(size, dtype=torch.uint8)
    after = machine.memory_facts()
    assert before is not None
    assert after["resident_bytes"] is not None
    assert after["peak_bytes"] is not None
    assert after["resident_bytes"] - before > 0.9 * held.numel()
    assert after["peak_bytes"] >= after["resident_bytes"] - (1 << 20)


def test_others_are_what_is_neither_idle_nor_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, busy = iter([10.0, 20.0]), iter([100.0, 108.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert machine.Watch().others(own_seconds=5.0) == pytest.approx(3 / 20)


def test_where_the_system_does_not_say_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_busy_seconds", lambda: None)
    assert machine.Watch().others(0.0) is None
    monkeypatch.setattr(os, "getloadavg", lambda: (_ for _ in ()).throw(OSError))
    assert machine.load_average() is None


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_memory_is_read_at_some_speed(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between that of a slow disk and of a hundred channels."""
    monkeypatch.setenv("PENNYWEIGHT_KERNELS", kernels)
    assert 1e8 < Memory(32 << 20, torch.get_num_threads()).read(3) < 1e13
