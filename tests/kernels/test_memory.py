"""Room for weights: zeros that may be written, in huge pages where the system gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.kernels.memory import room

_SMAPS = Path("/proc/self/smaps")
_SIZES = [0, 1, 4096, 1 << 21, (1 << 21) + 1, 5_000_000]


@pytest.mark.parametrize("size", _SIZES)
def test_room_is_zeros_that_may_be_written(size: int) -> None:
    memory, other = room(size), room(size)
    assert memory.dtype == torch.uint8
    assert memory.shape == (size,)
    assert not memory.any()
    memory.fill_(255)
    assert not other.any()
    assert memory.clone().eq(255).all()


def test_large_room_asks_for_huge_pages() -> None:
    if not _SMAPS.exists() or not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system says nothing of huge pages")
    assert "hg" in _flags(room(5_000_000))


def _flags(tensor: Tensor) -> list[str]:
    """What the kernel noted of the mapping that the tensor begins in."""
    is_here = False
    for line in _SMAPS.read_text(encoding="utf-8").splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(address, 16) for address in first.split("-"))
            is_here = begin <= tensor.data_ptr() < end
        elif is_here and first == "VmFlags:":
            return line.split()[1:]
    return []
