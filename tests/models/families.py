"""Tiny random models of many families, saved by transformers itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 100
WIDTH = 32
BLOCKS = 2
# Biases and norms begin as zeros and ones, which would hide a tensor that was never read.
_SPREAD = 0.2

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_QKVO = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
}
_MLP = {"mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}


@dataclass(frozen=True)
class Family:
    """A tiny model of a family and what must be found in it.

    architecture  transformers' class of it
    config        what its config says beside the class's defaults
    prefix        name of the blocks in the checkpoint
    sites         name below its block -> (out, in), the same for each block but those in `others`
    shared        sites below a block that have the same input
    """

    architecture: str
    config: Mapping[str, Any]
    sites: Mapping[str, tuple[int, int]]
    shared: tuple[tuple[str, ...], ...]
    prefix: str = "model.layers"
    others: Mapping[int, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    experts: int = 0

    def expected(self) -> dict[str, tuple[int, int]]:
        """Checkpoint name -> (out, in) of every site of the model."""
        return {
            f"{self.prefix}.{block}.{name}": shape
            for block in range(BLOCKS)
            for name, shape in self.others.get(block, self.sites).items()
        }


def _experts(count: int, names: Mapping[str, tuple[int, int]], pattern: str = "mlp.experts.{}.{}") -> dict[str, Any]:
    return {pattern.format(index, name): shape for index in range(count) for name, shape in names.items()}


def _expert_pairs(
    count: int, pattern: str = "mlp.experts.{}.{}", pair: tuple[str, str] = ("gate_proj", "up_proj")
) -> Any:
    return tuple(tuple(pattern.format(index, name) for name in pair) for index in range(count))


_QKV = ATTENTION[:3]
_GATE_UP = GATED[:2]
_LLAMA_LIKE = (_QKV, _GATE_UP)
_SMALL = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}

_LATENT = {
    "self_attn.q_a_proj": (16, 32),
    "self_attn.q_b_proj": (32, 16),
    "self_attn.kv_a_proj_with_mqa": (20, 32),
    "self_attn.kv_b_proj": (48, 16),
    "self_attn.o_proj": (32, 32),
}
_LATENT_SHARED = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _DECODER, _QKVO | _MLP, _LLAMA_LIKE),
    "llama-tied": Family("LlamaForCausalLM", _DECODER | {"tie_word_embeddings": True}, _QKVO | _MLP, _LLAMA_LIKE),
    "llama-rope-scaled": Family(
        "LlamaForCausalLM",
        _DECODER
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        _QKVO | _MLP,
        _LLAMA_LIKE,
    ),
    "mistral": Family("MistralForCausalLM", _DECODER | {"sliding_window": 7}, _QKVO | _MLP, _LLAMA_LIKE),
    "qwen2": Family("Qwen2ForCausalLM", _DECODER, _QKVO | _MLP, _LLAMA_LIKE),
    "qwen3": Family("Qwen3ForCausalLM", _DECODER, _QKVO | _MLP, _LLAMA_LIKE),
    "gemma": Family("GemmaForCausalLM", _DECODER, _QKVO | _MLP, _LLAMA_LIKE),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _DECODER | {"sliding_window": 7, "query_pre_attn_scalar": 8},
        _QKVO | _MLP,
        _LLAMA_LIKE,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        _DECODER
        | {"sliding_window": 7, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
        _QKVO | _MLP,
        _LLAMA_LIKE,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _DECODER,
        {
            "self_attn.qkv_proj": (64, 32),
            "self_attn.o_proj": (32, 32),
            "mlp.gate_up_proj": (96, 32),
            "mlp.down_proj": (32, 48),
        },
        (),
    ),
    "phi": Family(
        "PhiForCausalLM",
        _DECODER,
        {
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (16, 32),
            "self_attn.v_proj": (16, 32),
            "self_attn.dense": (32, 32),
            "mlp.fc1": (48, 32),
            "mlp.fc2": (32, 48),
        },
        ((*_QKV, "mlp.fc1"),),
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64, "n_inner": 48},
        {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (48, 32), "mlp.c_proj": (32, 48)},
        (),
        prefix="transformer.h",
    ),
    "opt": Family(
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 24,
        },
        {
            "self_attn.q_proj": (32, 32),
            "self_attn.k_proj": (32, 32),
            "self_attn.v_proj": (32, 32),
            "self_attn.out_proj": (32, 32),
            "fc1": (48, 32),
            "fc2": (32, 48),
        },
        (_QKV,),
        prefix="model.decoder.layers",
    ),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM",
        _DECODER,
        {
            "attention.query_key_value": (96, 32),
            "attention.dense": (32, 32),
            "mlp.dense_h_to_4h": (48, 32),
            "mlp.dense_4h_to_h": (32, 48),
        },
        (),
        prefix="gpt_neox.layers",
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
        _QKVO | _experts(4, {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}, "block_sparse_moe.experts.{}.{}"),
        (_QKV, *_expert_pairs(4, "block_sparse_moe.experts.{}.{}", ("w1", "w3"))),
        experts=4,
    ),
    "qwen2-moe": Family(
        "Qwen2MoeForCausalLM",
        _DECODER | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 40},
        _QKVO
        | _experts(4, _SMALL)
        | {
            "mlp.shared_expert.gate_proj": (40, 32),
            "mlp.shared_expert.up_proj": (40, 32),
            "mlp.shared_expert.down_proj": (32, 40),
        },
        (_QKV, *_expert_pairs(4), ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")),
        experts=4,
    ),
    "qwen3-moe": Family(
        "Qwen3MoeForCausalLM",
        _DECODER | _EXPERTS | {"num_experts": 5, "norm_topk_prob": True},
        _QKVO | _experts(5, _SMALL),
        (_QKV, *_expert_pairs(5)),
        experts=5,
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        _DECODER
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        _QKVO
        | {f"mlp.experts.gate_up_proj.{index}": (96, 32) for index in range(4)}
        | {f"mlp.experts.down_proj.{index}": (32, 48) for index in range(4)},
        (_QKV,),
        experts=4,
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        _DECODER
        | {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
        _QKVO
        | {f"feed_forward.experts.gate_up_proj.{index}": (96, 32) for index in range(3)}
        | {f"feed_forward.experts.down_proj.{index}": (32, 48) for index in range(3)}
        | {
            f"feed_forward.shared_expert.{name}": shape
            for name, shape in {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}.items()
        },
        (_QKV, ("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj")),
        experts=3,
    ),
    "granite-moe": Family(
        "GraniteMoeForCausalLM",
        _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2},
        _QKVO
        | {f"block_sparse_moe.input_linear.weight.{index}": (96, 32) for index in range(4)}
        | {f"block_sparse_moe.output_linear.weight.{index}": (32, 48) for index in range(4)},
        (_QKV,),
        experts=4,
    ),
    "deepseek-v3": Family(
        "DeepseekV3ForCausalLM",
        _DECODER
        | _EXPERTS
        | {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "head_dim": 4,
            "num_key_value_heads": 4,
        },
        _LATENT | _MLP,
        (_LATENT_SHARED, _GATE_UP, *_expert_pairs(4), ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")),
        others={
            1: _LATENT | _experts(4, _SMALL) | {f"mlp.shared_experts.{name}": shape for name, shape in _SMALL.items()}
        },
        experts=4,
    ),
    "bert": Family(
        "BertModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        {
            "attention.self.query": (32, 32),
            "attention.self.key": (32, 32),
            "attention.self.value": (32, 32),
            "attention.output.dense": (32, 32),
            "intermediate.dense": (48, 32),
            "output.dense": (32, 48),
        },
        (("attention.self.query", "attention.self.key", "attention.self.value"),),
        prefix="encoder.layer",
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        {
            "text_config": _DECODER | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_id": 99,
        },
        _QKVO | _MLP,
        _LLAMA_LIKE,
        prefix="language_model.model.layers",
    ),
    "gemma3-vision": Family(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _DECODER | {"model_type": "gemma3_text", "query_pre_attn_scalar": 8},
            "vision_config": _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "image_token_id": 99,
            "mm_tokens_per_image": 4,
        },
        _QKVO | _MLP,
        _LLAMA_LIKE,
        prefix="language_model.model.layers",
    ),
    "qwen2-vl": Family(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _DECODER
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}},
            "vision_config": {"embed_dim": 32, "depth": 3, "num_heads": 2, "hidden_size": 32, "patch_size": 4},
            "image_token_id": 97,
            "video_token_id": 98,
            "vision_start_token_id": 95,
            "vision_end_token_id": 96,
        },
        _QKVO | _MLP,
        _LLAMA_LIKE,
    ),
}


def build(architecture: str, config: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """A model of transformers' class `architecture` with random weights, biases and norms, float32."""
    import transformers

    cls: Any = getattr(transformers, architecture)
    torch.manual_seed(seed)
    made = cls.config_class(**config)
    made.architectures = [architecture]
    model: nn.Module = cls(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=_SPREAD)
    return model


def save(model: nn.Module, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)  # type: ignore[operator]
    return directory


def token_batches(counts: tuple[int, ...] = (3, 1), length: int = 20, *, seed: int = 1) -> list[Tensor]:
    """Batches of random windows [count, length]; no special token among them."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (count, length), generator=generator) for count in counts]
