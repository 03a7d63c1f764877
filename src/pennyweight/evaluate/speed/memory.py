"""A streaming read of memory: what a decoder that did nothing but read its weights could reach."""

from __future__ import annotations

import statistics
import time

import torch

from pennyweight.kernels.native import kernel_table, native


class Memory:
    """`size` bytes that were written once, to be read with `threads` threads."""

    def __init__(self, size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._threads = threads
        self._bytes = torch.ones(size, dtype=torch.uint8)

    def read(self, passes: int) -> float:
        """Bytes a second: the median over `passes`."""
        return statistics.median(self._read() for _ in range(passes))

    def _read(self) -> float:
        library, kernels = native(), kernel_table()
        start = time.perf_counter()
        if library is None:
            self._bytes.view(torch.int64).sum()
        else:
            library.read_memory(self._bytes, self._threads, kernels)
        return self._bytes.numel() / (time.perf_counter() - start)
