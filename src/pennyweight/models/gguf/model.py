"""A GGUF file as a model that is quantized but not run, of whatever architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import Site, SiteKind
from pennyweight.models.gguf.checkpoint import GgufCheckpoint, Placed, checkpoint_of
from pennyweight.models.gguf.file import GgufFile, GgufTensor
from pennyweight.models.gguf.quantizable import axes, is_quantizable
from pennyweight.models.gguf.stored import Stored
from pennyweight.models.gguf.types import FLOAT_TYPES

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_FLOATS = {kind.number for kind in FLOAT_TYPES.values()}
_BLOCK = re.compile(r"(?:.*\.)?blk\.\d+(?=\.)")


@dataclass(frozen=True)
class GgufModel:
    """See `StoredModel` for the members. Tensors have the file's names; of one that stacks the matrices of all experts
    each is a tensor of its own, NAME.0.weight and so on. What lies outside the repeated blocks is one more block."""

    path: Path
    checkpoint: GgufCheckpoint
    blocks: list[str]
    sites: list[Site]
    head: Site | None
    embedding: Site | None
    refused: Mapping[str, str]
    device: torch.device
    why_no_head: str = "the file has no output.weight: its head shares the embedding's weight"
    is_decoder: bool = True
    calibrates_in_bfloat16: bool = False
    unused: Sequence[str] = ()
    stored_twice: frozenset[str] = frozenset()

    def sites_of(self, block: int) -> list[Site]:
        return [site for site in self.sites if site.block == block]


def architecture_of(file: GgufFile) -> str:
    """llama.cpp's name of the model's architecture; raises CheckpointError for a file that holds no model."""
    field = file.fields.get("general.architecture")
    if field is None or field.kind is not GGUFValueType.STRING or field.count is not None:
        raise CheckpointError(
            f"{file.files[0]}: does not say general.architecture, so it holds no model. Give the file of a model."
        )
    return str(field.value)


def open_model(path: Path, file: GgufFile, *, device: str = "cpu") -> GgufModel:
    """The model in `file`; `path` is what the user gave. Raises CheckpointError."""
    architecture = architecture_of(file)
    wanted: dict[str, Placed] = {}
    found: dict[str, list[Site]] = {}
    refused: dict[str, str] = {}
    for name, tensor in file.tensors.items():
        if not is_quantizable(name, tensor.shape, architecture):
            _want(wanted, file, name, Placed(tensor.shape, Stored(name, tensor.shape, is_float32=False)))
            continue
        reason = _why_refused(tensor)
        if reason is not None:
            refused[name.removesuffix(".weight")] = reason
        is_stack = len(tensor.shape) == 3 and axes(tensor.shape) == 3 and reason is None
        for own, placed in _matrices(name, tensor, is_stack=is_stack):
            _want(wanted, file, own, placed)
            if reason is None:
                found.setdefault(_block_of(name), []).append(_site(own, placed))
    blocks, every = _ordered(found)
    head, embedding = (next((site for site in every if site.kind == kind), None) for kind in ("head", "embedding"))
    sites = [site for site in every if site.kind not in ("head", "embedding")]
    return GgufModel(
        path=path,
        checkpoint=checkpoint_of(path, file, wanted),
        blocks=blocks,
        sites=sites if head is None else [*sites, head],
        head=head,
        embedding=embedding,
        refused=refused,
        device=torch.device(device),
    )


def _want(wanted: dict[str, Placed], file: GgufFile, name: str, placed: Placed) -> None:
    if name in wanted:
        raise CheckpointError(
            f"{file.files[0]}: {name} is a tensor of its own and a part of {placed.place.tensor}: rename one of them"
        )
    wanted[name] = placed


def _why_refused(tensor: GgufTensor) -> str | None:
    if tensor.type_number not in _FLOATS:
        kind = GGMLQuantizationType(tensor.type_number).name
        return f"it is {kind} in the file, not one of {', '.join(FLOAT_TYPES)}: it stays as it is"
    if not tensor.name.endswith(".weight") or 0 in tensor.shape or len(tensor.shape) > 3:
        return f"it is no matrix of weights: it has shape {list(tensor.shape)}"
    return None


def _matrices(name: str, tensor: GgufTensor, *, is_stack: bool) -> list[tuple[str, Placed]]:
    """Names of the matrices [out, in] in a tensor, and where they lie."""
    if not is_stack:
        shape = tensor.shape if len(tensor.shape) < 3 else (math.prod(tensor.shape[:-1]), tensor.shape[-1])
        return [(name, Placed(shape, Stored(name, tensor.shape, is_float32=False)))]
    stem, shape = name.removesuffix(".weight"), tensor.shape[1:]
    return [
        (f"{stem}.{index}.weight", Placed(shape, Stored(name, shape, is_float32=False, expert=index)))
        for index in range(tensor.shape[0])
    ]


def _site(name: str, placed: Placed) -> Site:
    kinds: dict[str, SiteKind] = {_EMBEDDING: "embedding", _HEAD: "head"}
    kind = kinds.get(name, "linear" if placed.place.expert is None else "expert")
    out, inputs = placed.shape
    return Site(name.removesuffix(".weight"), (out, inputs), -1, kind, name)


def _block_of(name: str) -> str:
    match = _BLOCK.match(name)
    return "" if match is None else match[0]


def _ordered(found: Mapping[str, Sequence[Site]]) -> tuple[list[str], list[Site]]:
    """The blocks in the order of the file, what lies outside of them behind, and sites with the blocks' numbers."""
    ends = {_EMBEDDING, _HEAD}
    has_others = any(site.tensor not in ends for site in found.get("", ()))
    blocks = [*(block for block in found if block), *([""] if has_others else [])]
    numbers = {block: number for number, block in enumerate(blocks)}
    numbers_of_ends = {_EMBEDDING: -1, _HEAD: len(blocks)}
    every = [
        replace(site, block=numbers_of_ends[site.tensor] if site.tensor in ends else numbers[block])
        for block, sites in found.items()
        for site in sites
    ]
    return blocks, sorted(every, key=lambda site: site.block)
