"""Small random models of the families that llama.cpp runs, with the tokenizer of the model that is shipped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import pennyweight
from pennyweight.pipeline.options import Options
from tests.pipeline import tiny

_DEMO = Path(pennyweight.__file__).parent / "demo_model"
# 256 divides the hidden size and not the inputs of the last projection of a block.
_SIZES: dict[str, Any] = dict(vocab_size=4096, hidden_size=256, intermediate_size=288, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                              bos_token_id=0, eos_token_id=1, pad_token_id=None)  # fmt: skip
_LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=32)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True)

# name -> class of the config, class of the model, what its config has beside the sizes
FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", dict(tie_word_embeddings=False)),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", dict(rope_parameters=_LLAMA3, tie_word_embeddings=True)),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=None)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(head_dim=64, tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(head_dim=64, **_EXPERTS)),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(num_local_experts=4, num_experts_per_tok=2)),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(head_dim=64, query_pre_attn_scalar=64)),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(head_dim=64, query_pre_attn_scalar=64)),
}
OPTIONS = Options(runtime="llama.cpp", effort="fast", calibration=(tiny.words(),), samples=4, length=32)
NEAREST = replace(OPTIONS, effort="normal", solver="nearest", calibration="none")


def family(name: str, directory: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """The model on disk: weights large enough that tokens differ, norms that are not all 1."""
    config, model, own = FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**(_SIZES | dict(own) | changes))).to(dtype)
    for parameter in made.parameters():
        parameter.data = parameter * 2 if parameter.ndim > 1 else parameter + 0.1 * torch.randn_like(parameter)
    made.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_DEMO / file, directory)
    return directory
