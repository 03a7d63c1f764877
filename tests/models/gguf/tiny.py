"""Small models of each family on disk, the same bytes wherever they are made."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests/golden/gguf"
DEMO = ROOT / "src/pennyweight/demo_model"
CARD = "---\nlicense: mit\nlanguage: [en]\nbase_model: org/Base-7B-v2\n---\n# A model\n"

# 600 pieces; users' own are <mask> and two spaces.
PIECES = GOLDEN / "sentencepiece.model"
SENTENCEPIECE_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "chat_template": "{{ messages }}",
    "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
        "2": {"content": "</s>", "special": True},
        "601": {"content": "<|user|>", "special": True},
        "602": {"content": "<tool>", "special": False},
    },
}

_BYTE_LEVEL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_PIECES = {**_BYTE_LEVEL, "vocab_size": 608, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "long_factor": [1.0 + step for step in range(8)],
    "short_factor": [1.0 + step / 10 for step in range(8)],
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

# name -> model_type, what its config says beside the defaults
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {**_BYTE_LEVEL, "attention_bias": True, "mlp_bias": True}),
    "llama-2": ("llama", _PIECES),
    "llama-3.1": (
        "llama",
        {**_BYTE_LEVEL, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 32},
    ),
    "mistral": ("mistral", {**_PIECES, "head_dim": 24}),
    "mixtral": ("mixtral", {**_PIECES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {**_BYTE_LEVEL, "rope_scaling": _YARN}),
    "qwen3": ("qwen3", {**_BYTE_LEVEL, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            **_BYTE_LEVEL,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma-2": ("gemma2", {**_PIECES, "head_dim": 16}),
    "gemma-3": ("gemma3_text", {**_PIECES, "head_dim": 16, "num_hidden_layers": 7}),
    "phi-3": ("phi3", {**_PIECES, "partial_rotary_factor": 0.5, "sliding_window": 200}),
    "phi-3-long": ("phi3", {**_PIECES, "rope_scaling": _LONGROPE, "original_max_position_embeddings": 128}),
}


def values(name: str, shape: Sequence[int]) -> Tensor:
    """Bfloat16 values in [-0.5, 0.5) that depend on name and position alone."""
    count = 1
    for length in shape:
        count *= length
    mixed = (torch.arange(count) * 40503 + zlib.crc32(name.encode())) % 65521
    return (mixed / 65521 - 0.5).to(torch.bfloat16).reshape(tuple(shape))


def write_model(path: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Path:
    """A directory with config.json, weights, card and tokenizer: of pieces for a vocabulary of 608 tokens."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "README.md").write_text(CARD)
    tensors = {name: values(name, shape) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if config["vocab_size"] == _PIECES["vocab_size"]:
        shutil.copy(PIECES, path / "tokenizer.model")
        (path / "tokenizer_config.json").write_text(json.dumps(SENTENCEPIECE_CONFIG))
    else:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / file, path / file)
    return path


def directory_name(name: str) -> str:
    """A name in which llama.cpp finds version, size and finetune."""
    return f"Tiny-{name}-1B-Instruct"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def plain(value: Any) -> Any:
    """A metadata value for a golden file: long arrays as digest and length."""
    if isinstance(value, list | tuple) and len(value) > 8:
        return {"length": len(value), "sha256": digest(json.dumps(list(value)).encode())}
    return list(value) if isinstance(value, tuple) else value
