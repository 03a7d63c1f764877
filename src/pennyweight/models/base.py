"""What a checkpoint and a site are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


class Checkpoint(Protocol):
    """Named tensors of a model on disk; nothing stays in memory.

    tensors        name -> type and shape of what `read` returns
    decoded_from   None for a float checkpoint, else what was decoded on reading, e.g. "fp8 weights with block scales"
    weight_files   the files that hold the weights, in order of name
    config_changes  what config.json must say in place of what it does for these tensors to mean the model
    """

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def decoded_from(self) -> str | None: ...
    @property
    def weight_files(self) -> list[Path]: ...
    @property
    def config_changes(self) -> Mapping[str, Any]: ...
    def read(self, name: str, part: slice | None = None) -> Tensor:
        """The tensor `name` (rows `part` of its first axis), fresh, in its stored type; raises CheckpointError."""


class StoredCheckpoint(Checkpoint, Protocol):
    """A checkpoint as it lies on the disk."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors, packed or not, without the headers of the files."""


SiteKind = Literal["linear", "conv1d", "expert", "head", "embedding"]


@dataclass(frozen=True)
class Site:
    """One weight matrix of a model that can be quantized.

    name        the checkpoint's name of it without ".weight": "model.layers.0.self_attn.q_proj"
    shape       (out, in), whatever way it is stored
    block       index of the repeated block it belongs to; of the head their number: it comes after the last;
                of the embedding -1
    kind        "conv1d" is stored transposed, [in, out]; "expert" is one expert's matrix; "head" the output head;
                "embedding" the table of tokens [vocabulary, width], which a tied head shares
    tensor      name of the checkpoint tensor that holds it
    index       position along the first axis where `tensor` holds all experts [experts, ...], else None
    rows        rows of that slice where it holds several matrices (gate and up), else None
    transposed  stored [in, out]
    """

    name: str
    shape: tuple[int, int]
    block: int
    kind: SiteKind
    tensor: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


class StoredModel(Protocol):
    """What a run asks of a model that it does not run: its weights, and which of them can be quantized.

    path           directory of config.json and tokenizer, or the file that is all there is
    blocks         names of the repeated blocks, in order
    sites          those of the blocks and, behind them, the `head` where it can be one; else `why_no_head`
    embedding      a site beside them
    refused        matrices that cannot be sites -> the reason
    unused         tensors that the model has no place for
    stored_twice   tensors that the checkpoint holds although they are another one's, tied
    """

    @property
    def path(self) -> Path: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def blocks(self) -> Sequence[str]: ...
    @property
    def sites(self) -> Sequence[Site]: ...
    @property
    def head(self) -> Site | None: ...
    @property
    def why_no_head(self) -> str: ...
    @property
    def embedding(self) -> Site | None: ...
    @property
    def refused(self) -> Mapping[str, str]: ...
    @property
    def is_decoder(self) -> bool: ...
    @property
    def calibrates_in_bfloat16(self) -> bool: ...
    @property
    def unused(self) -> Sequence[str]: ...
    @property
    def stored_twice(self) -> Collection[str]: ...
    def sites_of(self, block: int) -> list[Site]: ...
