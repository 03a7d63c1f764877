"""Tiny random models with a byte tokenizer on disk, text to calibrate on, and a run in one call."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from pennyweight.pipeline.options import Options
from pennyweight.pipeline.records import RunReport
from pennyweight.pipeline.run import quantize

# 256 bytes and one token that begins a text.
VOCABULARY = 257
_SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, num_attention_heads=4, num_hidden_layers=3, pad_token_id=None,
                              max_position_embeddings=64, bos_token_id=256, eos_token_id=256)  # fmt: skip
_GATED: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=False)


def llama(directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    config = transformers.LlamaConfig(**(_SIZES | _GATED | changes))
    return save(transformers.LlamaForCausalLM, config, directory, dtype=dtype)


def mixtral(directory: Path, **changes: Any) -> Path:
    experts = dict(num_local_experts=4, num_experts_per_tok=2)
    config = transformers.MixtralConfig(**(_SIZES | _GATED | experts | changes))
    return save(transformers.MixtralForCausalLM, config, directory)


def opt(directory: Path) -> Path:
    config = transformers.OPTConfig(**_SIZES, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32)
    return save(transformers.OPTForCausalLM, config, directory, dtype=torch.float16)


def neox(directory: Path) -> Path:
    config = transformers.GPTNeoXConfig(**_SIZES, hidden_size=32, intermediate_size=64)
    return save(transformers.GPTNeoXForCausalLM, config, directory)


def gpt2(directory: Path) -> Path:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64,
                                     bos_token_id=256, eos_token_id=256)  # fmt: skip
    return save(transformers.GPT2LMHeadModel, config, directory)


def save(model: Any, config: Any, directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights large enough that logits differ from token to token, and all that travels with them."""
    torch.manual_seed(0)
    made = model(config).to(dtype)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    made.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    (directory / "LICENSE").write_text("Do what you like.\n")
    (directory / "README.md").write_text("---\nlicense: mit\ntags:\n- tiny\n---\n\n# Tiny\n\n- made by a test\n")
    return directory


def byte_tokenizer() -> Any:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<s>": 256}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>")
    found.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return found


def words(count: int = 600, seed: int = 0) -> str:
    chosen = random.Random(seed)
    known = "a bee went over the hill and saw that nobody had mown the grass since May".split()  # noqa: SIM905
    return " ".join(chosen.choice(known) for _ in range(count))


def text_file(directory: Path, **kwargs: Any) -> str:
    file = directory / "text.txt"
    file.write_text(words(**kwargs))
    return str(file)


OPTIONS = Options(scheme="int4-g16", effort="fast", calibration=(words(),), samples=12, length=24)


def run(model: Path, out: Path, options: Options = OPTIONS, **kwargs: Any) -> RunReport:
    return quantize(str(model), out, options, **kwargs)


def digests(directory: Path) -> dict[str, str]:
    """The content of every file but run.json."""
    files = (file for file in directory.rglob("*") if file.is_file() and file.name != "run.json")
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def traces(parent: Path, out: str = "out") -> list[str]:
    """What a failed run left: the output, work directories."""
    return sorted(path.name for path in parent.iterdir() if path.name == out or path.name.startswith(f".{out}."))
