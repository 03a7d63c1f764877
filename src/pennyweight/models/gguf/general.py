"""`general.*`: what a GGUF file says about a model's name, origin and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import gguf

from pennyweight.core.errors import ModelError


def add_general(writer: gguf.GGUFWriter, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Add name, license, size and more of the model in `path`, from its card, generation_config.json and directory
    name; `shapes` are those of all tensors. Raises ModelError for a card that can't be read."""
    path = path.resolve()
    total, shared, expert, experts = _sizes(shapes)
    try:
        metadata = gguf.Metadata.load(None, path, None, total)
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path}: README.md or generation_config.json can't be read ({error}): remove it") from error
    _name_snapshot(metadata, path, total)
    metadata.name = metadata.name or path.name
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(total, shared, expert, experts)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    """Weights in all, outside the experts, of one expert of each layer; and the experts of a layer."""
    stacks = [shape for name, shape in shapes.items() if "_exps." in name]
    total = sum(prod(shape) for shape in shapes.values())
    shared = total - sum(prod(shape) for shape in stacks)
    experts = stacks[0][0] if stacks else 0
    return total, shared, sum(prod(shape[1:]) for shape in stacks), experts


def _name_snapshot(metadata: gguf.Metadata, path: Path, total: int) -> None:
    """The Hub's cache calls a directory by its commit: take the repository's name instead."""
    repository = path.parent.parent.name
    if path.parent.name != "snapshots" or not repository.startswith("models--"):
        return
    model = repository.removeprefix("models--").replace("--", "/")
    name, organization, basename, finetune, version, size_label = gguf.Metadata.get_model_id_components(model, total)
    title: Callable[[str], str] = gguf.Metadata.id_to_title
    metadata.name = title(name or model)
    metadata.organization = title(organization) if organization else None
    metadata.basename, metadata.finetune, metadata.version = basename, finetune, version
    metadata.size_label = size_label
