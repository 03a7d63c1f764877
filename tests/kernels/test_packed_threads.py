"""Threads change the time that products take, and nothing else."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from pennyweight.kernels.native import native
from pennyweight.kernels.packed import PackedMatrix, multiply
from tests.kernels.packed_cases import TABLES, Case, weight_of

pytestmark = pytest.mark.skipif(native() is None, reason="the native library is not built")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def weights() -> list[PackedMatrix]:
    cases = (("int4", 700, 32), ("nf4", 40, 64), ("uint3", 333, 64), ("int8", 1, 16))
    return [weight_of(name, Case(rows, 192, group, "float")).packed for name, rows, group in cases]


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_results_do_not_depend_on_the_number_of_threads(tokens: int) -> None:
    x, matrices = torch.randn(tokens, 192), weights()
    for activations in ("exact", "int8"):
        with threads(1):
            alone = multiply(x, matrices, activations=activations)  # type: ignore[arg-type]
        for count in (2, 3, 4):
            with threads(count):
                for _ in range(3):
                    together = multiply(x, matrices, activations=activations)  # type: ignore[arg-type]
                    assert all(map(torch.equal, together, alone))


def test_several_callers_at_once() -> None:
    matrices = weights()
    inputs = [torch.randn(tokens, 192) for tokens in (1, 3, 30)]
    with threads(2):
        expected = [multiply(x, matrices) for x in inputs]

        def call(index: int) -> bool:
            return all(
                all(map(torch.equal, multiply(inputs[index], matrices), expected[index])) for _ in range(10)
            )  # fmt: skip

        with ThreadPoolExecutor(3) as callers:
            assert all(callers.map(call, range(3)))


def test_sleepers_are_woken_on_another_processor_than_their_caller_is_on() -> None:
    """In virtual machines they would wait there until the caller's time is up. Who may use more, lets them use more."""
    if not hasattr(os, "sched_setaffinity") or not 2 <= len(whole := os.sched_getaffinity(0)) <= 8:
        pytest.skip("with one processor there is no other, and with many it is not done")
    x, matrices = torch.randn(4, 192), weights()
    try:
        for allowed in (set(sorted(whole)[:2]), whole):
            os.sched_setaffinity(0, allowed)
            with threads(2):
                expected = multiply(x, matrices)
                for _ in range(20):
                    time.sleep(0.005)
                    assert all(map(torch.equal, multiply(x, matrices), expected))
            masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
            assert any(mask < allowed and len(mask) == len(allowed) - 1 for mask in masks)
    finally:
        os.sched_setaffinity(0, whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    x, matrices = torch.randn(5, 192), weights()
    with threads(2):
        expected = multiply(x, matrices)
        with warnings.catch_warnings():
            # Newer versions of Python warn of forking a process of several threads: just what is tried here.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os._exit(0 if all(map(torch.equal, multiply(x, matrices), expected)) else 1)
        end = time.monotonic() + 60
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail("the child waits for threads that it does not have")
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(done[1]) == 0
        assert all(map(torch.equal, multiply(x, matrices), expected))


def test_a_read_of_memory_sees_every_byte() -> None:
    library = native()
    assert library is not None
    for table in TABLES:
        memory = torch.randint(0, 256, (10_000,), dtype=torch.uint8)
        before = library.read_memory(memory, 1, table)
        assert library.read_memory(memory, 1, table) == before
        for at in (0, 63, 4096, 8191, 8192, 9999):
            memory[at] ^= 1
            assert library.read_memory(memory, 1, table) != before
            memory[at] ^= 1
