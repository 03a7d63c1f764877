"""Files in memory without being read: the system loads what is touched and drops it when it needs the room."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError


class MappedFile:
    """A file mapped privately: writing to a tensor of it changes the memory of this process only."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where it cannot be read."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped into memory: {error}") from error

    def __len__(self) -> int:
        return len(self._memory)

    def tensor(self, *, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The bytes from `begin` on as a tensor; a copy where they do not lie as their type needs it.

        Raises CheckpointError where the file ends before.
        """
        count = 1
        for length in shape:
            count *= length
        if begin + count * dtype.itemsize > len(self._memory):
            raise CheckpointError(
                f"{self.path}: ends at byte {len(self._memory)}, but a tensor ends at {begin + count * dtype.itemsize}"
            )
        if not count:
            return torch.empty(shape, dtype=dtype)
        if begin % dtype.itemsize:
            raw = torch.frombuffer(self._memory, dtype=torch.uint8, count=count * dtype.itemsize, offset=begin)
            return raw.clone().view(dtype).view(shape)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(shape)
