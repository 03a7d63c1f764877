"""Which GGUF tensors the tensors of a checkpoint become."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import gguf

from pennyweight.core.errors import ContainerError
from pennyweight.models.base import TensorInfo
from pennyweight.models.gguf.families import Family
from pennyweight.models.gguf.rope import Hyper
from pennyweight.models.gguf.stored import Stored

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
# The rest of a model for text and images: llama.cpp reads it from a file of its own.
_NOT_TEXT = re.compile(r"(^|\.)(vision_tower|vision_model|multi_modal_projector|audio_tower)\.")
_FUSED = re.compile(r"\.experts\.gate_up_proj(\.weight)?$")
_FLOAT32_TYPES = (gguf.MODEL_TENSOR.FFN_GATE_INP,)


@dataclass(frozen=True)
class Places:
    """places: checkpoint tensor -> where it goes, mostly one place; dropped: -> why it goes nowhere."""

    places: Mapping[str, tuple[Stored, ...]]
    dropped: Mapping[str, str]


def placed(family: Family, hyper: Hyper, tensors: Mapping[str, TensorInfo], *, tokens: int) -> Places:
    """Where GGUF stores each of `tensors`, for a tokenizer of `tokens` tokens.

    Raises ContainerError for a tensor that llama.cpp does not know, two for one place, or a missing expert.
    """
    names = gguf.get_tensor_name_map(family.arch, int(hyper["num_hidden_layers"]))
    places: dict[str, tuple[Stored, ...]] = {}
    dropped: dict[str, str] = {}
    for name, info in tensors.items():
        reason = _why_dropped(name, hyper)
        if reason:
            dropped[name] = reason
        else:
            places[name] = tuple(
                _with_rules(stored, name, family, hyper, tokens=tokens) for stored in _parts(names, name, info, family)
            )
    _check_unique(places)
    return Places(places, dropped)


def _why_dropped(name: str, hyper: Hyper) -> str | None:
    if name.endswith((".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq", ".position_ids")):
        return "llama.cpp computes it"
    if _NOT_TEXT.search(name):
        return "not of the text model: llama.cpp reads it from a separate mmproj file"
    if name.endswith("lm_head.weight") and hyper.get("tie_word_embeddings"):
        return "tied to the embedding, which llama.cpp takes for it"
    return None


def _parts(names: gguf.TensorNameMap, name: str, info: TensorInfo, family: Family) -> list[Stored]:
    text_name = name.replace("language_model.", "")
    if _FUSED.search(name):
        half = info.shape[-2] // 2
        return [
            replace(
                _stored(names, name, _FUSED.sub(f".experts.{part}.weight", text_name), family),
                shape=(*info.shape[:-2], half, info.shape[-1]),
                rows=(index * half, (index + 1) * half),
            )
            for index, part in enumerate(("gate_proj", "up_proj"))
        ]
    if name.endswith(".experts.down_proj"):
        text_name += ".weight"
    expert = _EXPERT.search(text_name)
    stored = _stored(names, name, _EXPERT.sub(".experts.", text_name), family)
    return [replace(stored, shape=info.shape, expert=int(expert[1]) if expert else None)]


def _stored(names: gguf.TensorNameMap, name: str, text_name: str, family: Family) -> Stored:
    found = names.get_type_and_name(text_name, try_suffixes=(".weight", ".bias"))
    if found is None or found[0] not in gguf.MODEL_TENSORS[family.arch]:
        raise ContainerError(
            f"{name}: llama.cpp's {gguf.MODEL_ARCH_NAMES[family.arch]} has no such tensor. "
            "Choose another container, or remove it from the checkpoint if the model works without."
        )
    kind, tensor = found
    is_float32 = kind in _FLOAT32_TYPES or tensor.endswith("_norm.weight") or not tensor.endswith(".weight")
    return Stored(tensor, shape=(), is_float32=is_float32)


def _with_rules(stored: Stored, name: str, family: Family, hyper: Hyper, *, tokens: int) -> Stored:
    if len(stored.shape) < 2:
        stored = replace(stored, is_float32=True)
    if family.added and name.endswith("norm.weight"):
        stored = replace(stored, added=family.added)
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if family.is_permuted and name.endswith((f"{part}.weight", f"{part}.bias")):
            stored = replace(stored, heads=int(hyper[heads]))
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        rows = stored.shape[0]
        if rows < tokens:
            raise ContainerError(
                f"{name}: has {rows} rows for {tokens} tokens; tokenizer and checkpoint belong to different models"
            )
        if rows > tokens:
            stored = replace(stored, rows=(0, tokens), shape=(tokens, *stored.shape[1:]))
    return stored


def _check_unique(places: Mapping[str, tuple[Stored, ...]]) -> None:
    taken: dict[tuple[str, int | None], str] = {}
    for name, parts in places.items():
        for stored in parts:
            other = taken.setdefault((stored.tensor, stored.expert), name)
            if other != name:
                raise ContainerError(
                    f"{name} and {other} would both become {stored.tensor}; download the checkpoint again"
                )


def shapes_of(places: Mapping[str, tuple[Stored, ...]], *, experts: int) -> dict[str, tuple[int, ...]]:
    """Shape of each GGUF tensor, outermost axis first; raises ContainerError where experts are missing or differ."""
    shapes: dict[str, tuple[int, ...]] = {}
    found: dict[str, set[int]] = {}
    for name, parts in places.items():
        for stored in parts:
            shape = stored.shape if stored.expert is None else (experts, *stored.shape)
            if shapes.setdefault(stored.tensor, shape) != shape:
                raise ContainerError(
                    f"{name}: shape {stored.shape}, but other experts of {stored.tensor} have another one; "
                    "a GGUF file holds all experts of a layer in one tensor"
                )
            if stored.expert is not None:
                found.setdefault(stored.tensor, set()).add(stored.expert)
    for tensor, indices in found.items():
        if indices != set(range(experts)):
            raise ContainerError(
                f"{tensor}: the checkpoint has {len(indices)} experts for it, config.json says {experts}; "
                "download the checkpoint again"
            )
    return shapes
