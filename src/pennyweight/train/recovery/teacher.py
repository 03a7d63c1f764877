"""What the original says about the calibration windows, kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.containers.weight_files import OpenWeightFiles, WeightFiles
from pennyweight.core.files import check_space
from pennyweight.core.parallel import parallel_map
from pennyweight.models.base import TensorInfo
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.losses import distance
from pennyweight.train.recovery.loss import divergence, top_classes


@dataclass(frozen=True)
class Teacher:
    """The outputs of the original for each batch, read from disk when they are needed.

    count   tokens whose probability is known by itself, None for an encoder, of which the last hidden state is known
    """

    files: OpenWeightFiles
    count: int | None
    temperature: float

    def loss(self, output: Tensor, batch: int) -> Tensor:
        """The student's loss summed over the tokens of `batch`: `divergence` of a decoder, `distance` of an encoder;
        `output` [windows, tokens, vocabulary or width]."""
        flat = output.flatten(0, 1)
        if self.count is None:
            return distance(flat, self.files.read(f"{batch}.hidden").to(flat.device))
        teacher = self.files.read(f"{batch}.classes").to(flat.device)
        tokens = self.files.read(f"{batch}.tokens").to(flat.device, torch.int64)
        return divergence(flat, teacher, tokens, temperature=self.temperature)


@contextmanager
def teaching(
    original: StreamedModel, batches: Sequence[Tensor], directory: Path, *, count: int, temperature: float = 1.0
) -> Iterator[Teacher]:
    """Run `original` on `batches` of windows [windows, tokens], block by block, and keep what it says in `directory`.

    Of a decoder the `count` most likely tokens and the probability of all others together: (8 count + 4) bytes a
    token.
    """
    config = original.config.get_text_config()
    known = min(count, int(config.vocab_size)) if original.is_decoder else None
    layout = WeightFiles.plan(_entries(batches, known, width=int(config.hidden_size)))
    check_space(directory, layout.size_bytes)
    with layout.create(directory) as files:
        _fill(original, batches, files, count=known, temperature=temperature)
        yield Teacher(files, known, temperature)


def _entries(batches: Sequence[Tensor], count: int | None, *, width: int) -> dict[str, TensorInfo]:
    entries: dict[str, TensorInfo] = {}
    for batch, ids in enumerate(batches):
        if count is None:
            entries[f"{batch}.hidden"] = TensorInfo(torch.float32, (ids.numel(), width))
        else:
            entries[f"{batch}.classes"] = TensorInfo(torch.float32, (ids.numel(), count + 1))
            entries[f"{batch}.tokens"] = TensorInfo(torch.int32, (ids.numel(), count))
    return entries


def _fill(
    original: StreamedModel, batches: Sequence[Tensor], files: OpenWeightFiles, *, count: int | None, temperature: float
) -> None:
    stream = original.run(batches)
    with original.finishing(stream) as finish:

        def one(batch: int) -> None:
            output = finish(batch).flatten(0, 1)
            if count is None:
                files.write(f"{batch}.hidden", output.float())
                return
            classes, tokens = top_classes(output, count, temperature=temperature)
            files.write(f"{batch}.classes", classes)
            files.write(f"{batch}.tokens", tokens.to(torch.int32))

        parallel_map(one, range(len(batches)))
