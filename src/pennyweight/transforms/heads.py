"""Heads: runs of channels that a block only ever adds up together, so that they may be turned into one another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pennyweight.transforms.base import Fold
from pennyweight.transforms.hadamard import Rotation, is_known, tiled_rotation
from pennyweight.transforms.probe import Change, Run, trace
from pennyweight.transforms.structure import same


def head_size(block: nn.Module, run: Run, fold: Fold) -> int:
    """The longest run of a fold's channels that the block lets us rotate (values of one head); 1 where it lets none.

    Proved as folds are: the rows that make the channels are rotated and their reader's columns rotated back.
    """
    if fold.is_norm or len(fold.readers) != 1:
        return 1
    base = trace(block, run)
    first, reader = fold.producer[0], fold.readers[0]
    for size in range(fold.size, 1, -1):
        if fold.size % size or not is_known(size) or not _in_whole_runs(reader.source, size):
            continue
        rows = tiled_rotation(fold.size, size)
        columns = tiled_rotation(len(reader.source), size)
        before = {reader.parameter: columns.undo}
        after = {first.parameter: _turned(first.rows, rows)}
        if same(trace(block, run, before=before, after=after).output, base.output):
            return size
    return 1


def _in_whole_runs(source: Tensor, size: int) -> bool:
    """Columns come in runs of `size` that are a run of channels each."""
    if len(source) % size:
        return False
    runs = source.reshape(-1, size)
    return bool((runs == runs[:, :1] + torch.arange(size)).all() and (runs[:, 0] % size == 0).all())


def _turned(rows: Tensor, rotation: Rotation) -> Change:
    def change(out: Tensor) -> Tensor:
        turned = out.clone()
        turned[..., rows] = rotation.apply(out[..., rows])
        return turned

    return change
