"""Write a Llama checkpoint of random weights, TinyLlama's shape: 1.1 B weights at 22 blocks, bfloat16.

    python -m benchmarks.synthetic OUT [--blocks 4|8|22] [--single] [--tokens FILE] [--seed 0]

Weights are normal with a standard deviation of 1/sqrt(inputs), so that a unit-variance input gives a unit-variance
output; matrices that write to the residual stream are divided by sqrt(2 x 22). Six channels stand out: four times the
embedding, four times the gain of both norms. Each tensor is seeded by its name, so a checkpoint of 4 blocks is the
beginning of one of 22, and the bytes do not depend on sharding. Tensors are made and written one at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
HEADS, KEY_VALUE_HEADS, HEAD_WIDTH = 32, 4, 64
FULL_DEPTH = 22
CONTEXT = 2048

OUTLIER_CHANNELS = (7, 311, 640, 1023, 1415, 1901)
OUTLIER_FACTOR = 4.0
RESIDUAL_STD_FACTOR = (2 * FULL_DEPTH) ** -0.5

SHARD_BYTES = 1_000_000_000
BYTES_PER_WEIGHT = 2  # bfloat16
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the checkpoint before it is made."""

    name: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * BYTES_PER_WEIGHT


def checkpoint_tensors(blocks: int) -> Iterator[TensorSpec]:
    """The tensors of a Llama with `blocks` transformer blocks, in the order in which they are stored."""
    yield TensorSpec("model.embed_tokens.weight", (VOCABULARY, HIDDEN))
    for index in range(blocks):
        yield from block_tensors(f"model.layers.{index}")
    yield TensorSpec("model.norm.weight", (HIDDEN,))
    yield TensorSpec("lm_head.weight", (VOCABULARY, HIDDEN))


def block_tensors(prefix: str) -> Iterator[TensorSpec]:
    """The tensors of one transformer block."""
    queries, keys = HEADS * HEAD_WIDTH, KEY_VALUE_HEADS * HEAD_WIDTH
    yield TensorSpec(f"{prefix}.input_layernorm.weight", (HIDDEN,))
    yield TensorSpec(f"{prefix}.self_attn.q_proj.weight", (queries, HIDDEN))
    yield TensorSpec(f"{prefix}.self_attn.k_proj.weight", (keys, HIDDEN))
    yield TensorSpec(f"{prefix}.self_attn.v_proj.weight", (keys, HIDDEN))
    yield TensorSpec(f"{prefix}.self_attn.o_proj.weight", (HIDDEN, queries))
    yield TensorSpec(f"{prefix}.post_attention_layernorm.weight", (HIDDEN,))
    yield TensorSpec(f"{prefix}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN))
    yield TensorSpec(f"{prefix}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN))
    yield TensorSpec(f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE))


def make_tensor(spec: TensorSpec, seed: int) -> Tensor:
    """The weights of `spec`, bfloat16; they depend on its name, its shape and `seed` alone."""
    generator = torch.Generator().manual_seed(seed_of(spec.name, seed))
    noise = torch.randn(spec.shape, generator=generator)
    if spec.name.endswith("norm.weight"):
        gain = noise.mul_(0.1).add_(1.0)
        # The last norm keeps its gains: scaled there, the outliers would make the logits implausibly sharp.
        if spec.name != "model.norm.weight":
            gain[list(OUTLIER_CHANNELS)] *= OUTLIER_FACTOR
        return gain.bfloat16()
    if spec.name == "model.embed_tokens.weight":
        noise[:, list(OUTLIER_CHANNELS)] *= OUTLIER_FACTOR
        return noise.bfloat16()
    std = float(spec.shape[1]) ** -0.5
    if spec.name.endswith(("o_proj.weight", "down_proj.weight")):
        std *= RESIDUAL_STD_FACTOR
    return noise.mul_(std).bfloat16()


def seed_of(name: str, seed: int) -> int:
    """A 63-bit seed for the tensor `name`: the same in every process, unlike `hash`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def split_into_shards(specs: Sequence[TensorSpec], *, limit_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive tensors in shards of at most `limit_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.size_bytes > room:
            shards.append([])
            room = limit_bytes
        shards[-1].append(spec)
        room -= spec.size_bytes
    return shards


def write_safetensors(path: Path, specs: Sequence[TensorSpec], *, seed: int) -> None:
    """Write one safetensors file, holding one tensor in memory at a time.

    The file is an 8-byte little-endian header length, the header (JSON, padded to 8 bytes), the tensors' bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.size_bytes
        header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": (start, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for spec in specs:
            # numpy has no bfloat16: the same bytes seen as int16.
            file.write(make_tensor(spec, seed).view(torch.int16).numpy().data)


def write_weights(out: Path, *, blocks: int, is_single: bool, seed: int) -> None:
    """Write the weight files, and the index where there are several."""
    specs = list(checkpoint_tensors(blocks))
    total_bytes = sum(spec.size_bytes for spec in specs)
    shards = split_into_shards(specs, limit_bytes=total_bytes if is_single else SHARD_BYTES)
    if len(shards) == 1:
        write_safetensors(out / "model.safetensors", specs, seed=seed)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(out / file_name, shard, seed=seed)
        weight_map |= {spec.name: file_name for spec in shard}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(out / "model.safetensors.index.json", index)


def write_config(out: Path, *, blocks: int) -> None:
    """Write `config.json` and `generation_config.json`."""
    special = {
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_WIDTH,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **special,
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", special)


def write_tokenizer(out: Path) -> None:
    """Write a byte-level BPE without merges: one token a byte; the rest of the model's vocabulary is padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    write_json(out / "tokenizer_config.json", config)


def write_tokens(path: Path, *, seed: int, windows: int = 8, length: int = 512) -> None:
    """Write calibration windows of uniformly random ids: `input_ids`, int64 [windows, length]."""
    generator = torch.Generator().manual_seed(seed_of("calibration", seed))
    ids = torch.randint(len(SPECIAL_TOKENS), VOCABULARY, (windows, length), generator=generator)
    save_file({"input_ids": ids}, path)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a Llama checkpoint of random weights, for benchmarks.")
    parser.add_argument("out", type=Path, help="directory to write; must not exist, or be empty")
    parser.add_argument("--blocks", type=int, default=FULL_DEPTH, help="transformer blocks (default: %(default)s)")
    parser.add_argument("--single", action="store_true", help="one weight file instead of shards of 1 GB")
    parser.add_argument("--tokens", type=Path, help="also write 8 x 512 random calibration tokens to this file")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.blocks < 1:
        parser.error(f"--blocks must be at least 1, not {arguments.blocks}")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"{arguments.out} exists and is not an empty directory")
    return arguments


def main() -> None:
    """Write what the command line asks for."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_config(arguments.out, blocks=arguments.blocks)
    write_tokenizer(arguments.out)
    write_weights(arguments.out, blocks=arguments.blocks, is_single=arguments.single, seed=arguments.seed)
    if arguments.tokens is not None:
        write_tokens(arguments.tokens, seed=arguments.seed)


if __name__ == "__main__":
    main()
