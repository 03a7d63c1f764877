"""The model families that can be written as GGUF, and what a GGUF file says about each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from pennyweight.core.errors import ContainerError
from pennyweight.models.gguf.rope import (
    Hyper,
    add_scaling,
    head_dim,
    local_rope_theta,
    longrope_attention_factor,
    partial_rope_dims,
    rope_of,
)


@dataclass(frozen=True)
class Family:
    """What llama.cpp's converter does for one `model_type`.

    arch         the architecture under which llama.cpp knows it
    parameters   adds the model's numbers to a writer
    scaling      kinds of rope scaling that llama.cpp computes for it, beside none
    activation   the one activation that llama.cpp computes for it
    is_permuted  rows of q and k are stored in pairs for rope
    added        added to the weights of all norms
    full_every   1 where all layers see the whole context, n where only each n-th does (the last of n)
    has_prefix   None, or whether text begins with a space whatever the tokenizer's files say
    """

    arch: gguf.MODEL_ARCH
    parameters: Callable[[gguf.GGUFWriter, Hyper], None]
    scaling: tuple[str, ...] = ("linear", "yarn")
    activation: str = "silu"
    is_permuted: bool = False
    added: float = 0.0
    full_every: int = 1
    has_prefix: bool | None = None


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model's config.json; raises ContainerError where GGUF names are not known here."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ContainerError(
            f"model_type {kind!r} can't be written as GGUF; known are {', '.join(FAMILIES)}. Give one of them, or "
            "convert the model with llama.cpp's convert_hf_to_gguf.py and give that GGUF file."
        )
    return FAMILIES[kind]


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the defaults of its model class; of a model for text and images the part for text."""
    from transformers import AutoConfig

    values = {**config, **(config.get("text_config") or {})}
    kind = values.pop("model_type", None)
    # Says how weights are stored, not what the model computes; some classes refuse what they do not know there.
    values.pop("quantization_config", None)
    return dict(AutoConfig.for_model(kind, **values).to_dict())


def check(family: Family, hyper: Hyper) -> None:
    """Raise ContainerError where llama.cpp would compute another function than this model's."""
    activation = hyper.get("hidden_activation") or hyper.get("hidden_act")
    if activation != family.activation:
        raise ContainerError(
            f"config.json: activation {activation!r}, but llama.cpp computes {family.activation!r} for this family. "
            "Choose another container."
        )
    scaling = rope_of(hyper)["rope_type"]
    if scaling not in ("default", *family.scaling):
        raise ContainerError(
            f"config.json: rope_type {scaling!r} can't be said in a GGUF file of this family; known are "
            f"{', '.join(('default', *family.scaling))}. Choose another container."
        )
    if hyper.get("norm_topk_prob") is False:
        raise ContainerError(
            "config.json: norm_topk_prob is false, but llama.cpp makes the weights of the chosen experts sum to 1. "
            "Choose another container."
        )
    layers = hyper.get("layer_types") if family.full_every > 1 else None
    for index, layer in enumerate(layers or ()):
        expected = "sliding_attention" if (index + 1) % family.full_every else "full_attention"
        if layer != expected:
            raise ContainerError(
                f"config.json: layer {index} has {layer}, but llama.cpp computes {expected} there. "
                "Choose another container."
            )


# How a file says what config.json has under one name.
_SAID: Mapping[str, Callable[[gguf.GGUFWriter, Any], None]] = {
    "num_hidden_layers": gguf.GGUFWriter.add_block_count,
    "max_position_embeddings": gguf.GGUFWriter.add_context_length,
    "hidden_size": gguf.GGUFWriter.add_embedding_length,
    "intermediate_size": gguf.GGUFWriter.add_feed_forward_length,
    "num_attention_heads": gguf.GGUFWriter.add_head_count,
    "num_key_value_heads": gguf.GGUFWriter.add_head_count_kv,
    "rms_norm_eps": gguf.GGUFWriter.add_layer_norm_rms_eps,
    "attn_logit_softcapping": gguf.GGUFWriter.add_attn_logit_softcapping,
    "final_logit_softcapping": gguf.GGUFWriter.add_final_logit_softcapping,
    "sliding_window": gguf.GGUFWriter.add_sliding_window,
}
_HEADS = ("num_attention_heads", "num_key_value_heads")


def _say(writer: gguf.GGUFWriter, hyper: Hyper, *names: str) -> None:
    """Each family has an order of its own."""
    for name in names:
        _SAID[name](writer, hyper[name])


def _common(writer: gguf.GGUFWriter, hyper: Hyper) -> None:
    """What most families say, in the order of llama.cpp's converter."""
    rope = rope_of(hyper)
    _say(writer, hyper, "num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", *_HEADS)
    add_scaling(writer, rope)
    if rope.get("rope_theta") is not None:
        writer.add_rope_freq_base(rope["rope_theta"])
    local = local_rope_theta(hyper)
    if local is not None:
        writer.add_rope_freq_base_swa(local)
    _say(writer, hyper, "rms_norm_eps")
    experts = expert_count(hyper)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(hyper["num_experts_per_tok"])
    if hyper.get("head_dim") is not None:
        writer.add_key_length(hyper["head_dim"])
        writer.add_value_length(hyper["head_dim"])


def expert_count(hyper: Hyper) -> int:
    """Experts of a layer, 0 where there are none."""
    return int(hyper.get("num_local_experts") or hyper.get("num_experts") or 0)


def _llama(writer: gguf.GGUFWriter, hyper: Hyper) -> None:
    _common(writer, hyper)
    writer.add_vocab_size(hyper["vocab_size"])
    writer.add_rope_dimension_count(head_dim(hyper))


def _qwen3_moe(writer: gguf.GGUFWriter, hyper: Hyper) -> None:
    _common(writer, hyper)
    writer.add_expert_feed_forward_length(hyper["moe_intermediate_size"])


def _gemma2(writer: gguf.GGUFWriter, hyper: Hyper) -> None:
    _say(writer, hyper, "max_position_embeddings", "hidden_size", "num_hidden_layers", "intermediate_size", *_HEADS)
    _say(writer, hyper, "rms_norm_eps")
    writer.add_key_length(hyper["head_dim"])
    writer.add_value_length(hyper["head_dim"])
    _say(writer, hyper, "attn_logit_softcapping", "final_logit_softcapping", "sliding_window")


def _gemma3(writer: gguf.GGUFWriter, hyper: Hyper) -> None:
    if hyper.get("attn_logit_softcapping") is not None:
        raise ContainerError("config.json: llama.cpp's Gemma 3 has no attn_logit_softcapping: choose another container")
    _common(writer, hyper)
    if hyper.get("final_logit_softcapping"):
        _say(writer, hyper, "final_logit_softcapping")
    _say(writer, hyper, "sliding_window")


def _phi3(writer: gguf.GGUFWriter, hyper: Hyper) -> None:
    rope = rope_of(hyper)
    _say(writer, hyper, "max_position_embeddings")
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    _say(writer, hyper, "hidden_size", "intermediate_size", "num_hidden_layers", *_HEADS, "rms_norm_eps")
    writer.add_rope_dimension_count(partial_rope_dims(hyper))
    writer.add_rope_freq_base(rope["rope_theta"])
    # 0 tells llama.cpp that this is Phi-4, which has no window.
    writer.add_sliding_window(hyper.get("sliding_window") or 0)
    if rope.get("long_factor"):
        writer.add_rope_scaling_attn_factors(longrope_attention_factor(hyper))


_ARCH = gguf.MODEL_ARCH
_LLAMA = Family(_ARCH.LLAMA, _llama, scaling=("linear", "yarn", "llama3"), is_permuted=True)
_GEMMA2 = Family(_ARCH.GEMMA2, _gemma2, (), activation="gelu_pytorch_tanh", added=1.0, full_every=2, has_prefix=False)
_GEMMA3 = Family(
    _ARCH.GEMMA3, _gemma3, ("linear",), activation="gelu_pytorch_tanh", added=1.0, full_every=6, has_prefix=False
)

# By `model_type`. "gemma3" is the model for text and images, of which a GGUF file holds the part for text.
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": Family(_ARCH.QWEN2, _common),
    "qwen3": Family(_ARCH.QWEN3, _common),
    "qwen3_moe": Family(_ARCH.QWEN3MOE, _qwen3_moe),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi3": Family(_ARCH.PHI3, _phi3, scaling=("longrope", "su")),
}
