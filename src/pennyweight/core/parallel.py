"""Work cut into fixed chunks, each computed by one thread in the same way whoever runs it.

The results therefore do not depend on the number of threads, which torch's own multi-threaded matrix
products and factorisations do not promise. The number of threads is the caller's torch setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        threads, thread_name_prefix="pennyweight", initializer=torch.set_num_threads, initargs=(1,)
    )


# Inside `one_thread_per_operation`: how many threads its caller had allowed.
_allowed: ContextVar[int | None] = ContextVar("allowed_threads", default=None)


@contextmanager
def one_thread_per_operation() -> Iterator[int]:
    """Torch operations inside run on one thread each, and `parallel_map` on as many as the caller allowed; yields that.

    A whole run is put inside: between two operations on several threads OpenMP's helpers spin, and take the cores from
    the threads of `parallel_map`.
    """
    known = _allowed.get()
    threads = torch.get_num_threads() if known is None else known
    token = _allowed.set(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
        _allowed.reset(token)


def allowed_threads() -> int:
    """How many threads `parallel_map` uses here."""
    known = _allowed.get()
    return torch.get_num_threads() if known is None else known


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """[function(item) for item in items], on as many threads as torch may use; each item's work is single-threaded.

    Nested calls run inline, and nothing is recorded for gradients. The first exception (in item order) is raised when
    no item runs any more.
    """
    work = list(items)
    with one_thread_per_operation() as threads, torch.no_grad():
        if threads == 1 or len(work) < 2:
            return [function(item) for item in work]
        call = _in_this_mode(function)
        futures = [_pool(threads).submit(call, item) for item in work]
        try:
            wait(futures)
        finally:
            # Interrupted: what has not begun never will, and what has ends before its caller closes files.
            wait([future for future in futures if not future.cancel()])
        return [future.result() for future in futures]


def _in_this_mode(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    # Gradient and inference mode are settings of the thread: a pool thread must be told those of its caller.
    inference = torch.is_inference_mode_enabled()

    def call(item: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return function(item)

    return call


def chunks(length: int, size: int) -> list[slice]:
    """`range(length)` as consecutive slices of at most `size`.

    >>> chunks(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
