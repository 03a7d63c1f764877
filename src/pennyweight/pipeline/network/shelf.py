"""Where the values of a network wait for their readers: in memory, and in files once that is full."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Shelf:
    """Tensors that were put here take at most `memory_bytes` of memory; what comes later lies in files of `place`,
    which the system reads and writes as it is needed. A tensor that nobody refers to any more makes room again."""

    def __init__(self, memory_bytes: int, place: Path) -> None:
        self.memory_bytes, self._place = memory_bytes, place
        self.used_bytes, self.filed_bytes = 0, 0
        self._known: set[int] = set()
        self._files = 0

    def put(self, values: list[Any]) -> list[Any]:
        """The same values, some of their tensors in files."""
        return [pytree.tree_map_only(Tensor, self._put, value) for value in values]

    def _put(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # A view of something that lies here, or a constant.
        if storage.data_ptr() in self._known or tensor.device.type != "cpu" or not tensor.numel():
            return tensor
        size = storage.nbytes()
        if self.used_bytes + size > self.memory_bytes:
            return self._filed(tensor)
        self._keep(tensor, storage.data_ptr(), size)
        return tensor

    def _keep(self, tensor: Tensor, address: int, size: int) -> None:
        self.used_bytes += size
        self._known.add(address)
        finalize(tensor.untyped_storage(), self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self.used_bytes -= size
        self._known.discard(address)

    def _filed(self, tensor: Tensor) -> Tensor:
        self._files += 1
        path = self._place / f"{self._files}"
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        # The mapping keeps the bytes until nobody needs them; where a file in use cannot go, it goes with the folder.
        with contextlib.suppress(PermissionError):
            path.unlink()
        self.filed_bytes += mapped.nbytes
        return mapped.view(tensor.shape).copy_(tensor)


@contextlib.contextmanager
def shelf(memory_bytes: int) -> Iterator[Shelf]:
    with tempfile.TemporaryDirectory(prefix="pennyweight-values-", ignore_cleanup_errors=True) as place:
        yield Shelf(memory_bytes, Path(place))
