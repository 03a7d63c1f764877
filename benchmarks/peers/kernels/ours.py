"""Pennyweight's packed weights, in its own scheme of each width, and the streaming read beside everybody's products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.peers.kernels.contest import THREADS, Contestant, Facts, Mode, Size, bytes_of, rounded
from pennyweight.formats.integer import Int
from pennyweight.kernels.native import kernel_table, native
from pennyweight.kernels.packed import PackedMatrix, multiply

LIBRARY = "pennyweight"


class Packed:
    """Symmetric weights with bfloat16 scales; the input is float32 but where the mode says bfloat16."""

    def __init__(self, size: Size, *, bits: int, group: int, mode: Mode) -> None:
        self._made = rounded(size, bits=bits, group=group, scale=torch.bfloat16)
        codes, scales = size.of_rows(self._made.codes), size.of_rows(self._made.scales)
        self._matrices = [PackedMatrix.pack(codes, scales, element=Int(bits)) for _ in range(size.count)]
        self._size = size
        self.memory: Sequence[Tensor] = [bytes_of(matrix.storage) for matrix in self._matrices]
        shape = f"g{group}" if group < size.cols else "channel"
        self.facts = Facts(f"int{bits}-{shape} {mode}", LIBRARY, bits, group, mode, self._matrices[0].storage.nbytes)

    def take(self, x: Tensor) -> None:
        self._x = x.bfloat16() if self.facts.mode == "bfloat16" else x

    def run(self) -> None:
        activations = "int8" if self.facts.mode == "int8" else "exact"
        self._outs: list[Tensor] = []
        for matrix in self._matrices:
            self._outs += multiply(self._x, [matrix], activations=activations)

    def outcome(self, index: int) -> Tensor:
        return self._outs[index].float()

    def decoded(self) -> Tensor:
        return self._made.decoded(self._size)


def contestants(size: Size, bits: int) -> Iterator[Contestant]:
    modes: Sequence[Mode] = ("int8", "float32", "bfloat16")
    for group in (32, 128, size.cols) if bits == 8 else (32, 128):
        for mode in modes:
            yield Packed(size, bits=bits, group=group, mode=mode)


def stream_read(memory: Tensor) -> None:
    """Read `memory`, uint8, once on as many threads as the kernels use: what memory gives in these seconds."""
    library = native()
    if library is None:
        memory.view(torch.int64).sum()
    else:
        library.read_memory(memory, THREADS, kernel_table())
