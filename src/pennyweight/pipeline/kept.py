"""What the blocks of a model are given, and what the last one gives, kept in files on the way through them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pennyweight.containers.weight_files import OpenWeightFiles, WeightFiles
from pennyweight.core.files import check_space
from pennyweight.models.base import TensorInfo
from pennyweight.models.stream import Stream
from pennyweight.models.streamed import StreamedModel


@dataclass(frozen=True)
class KeptStates:
    """The hidden states [windows, tokens, width] of each batch before each block and behind the last, in `dtype`."""

    files: OpenWeightFiles
    dtype: torch.dtype
    device: torch.device

    def put(self, index: int, stream: Stream) -> None:
        """Keep what block `index` is given; behind the last block, what that gives."""
        for batch, hidden in enumerate(stream.hidden):
            self.files.write(f"{index}.{batch}", hidden.detach().to("cpu", self.dtype))

    def take(self, index: int, stream: Stream) -> None:
        """Give `stream` what was kept of `index`, float32."""
        for batch in range(len(stream.hidden)):
            stream.hidden[batch] = self.files.read(f"{index}.{batch}").to(self.device, torch.float32)


@contextmanager
def kept_states(model: StreamedModel, stream: Stream, scratch: Path, dtype: torch.dtype) -> Iterator[KeptStates]:
    """Files in the new directory `scratch`, which goes away."""
    layout = WeightFiles.plan(
        {
            f"{index}.{batch}": TensorInfo(dtype, tuple(hidden.shape))
            for index in range(len(model.blocks) + 1)
            for batch, hidden in enumerate(stream.hidden)
        }
    )
    scratch.mkdir()
    try:
        check_space(scratch, layout.size_bytes)
        with layout.create(scratch) as files:
            yield KeptStates(files, dtype, model.device)
    finally:
        shutil.rmtree(scratch)
