"""Ask llama-quantize for the type of every tensor in each of its mixes, for models of many shapes.

    python tests/golden/gguf/make_presets.py LLAMA_QUANTIZE > tests/golden/gguf/presets.json

LLAMA_QUANTIZE is the tool, built from the sources in llama-cpp-python 0.3.36. It is given files of holes, which take
no room, and asked with --dry-run. Nothing of Pennyweight is used.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PRESETS = (
    "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S",
    "Q5_K_M", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS", "TQ2_0", "MXFP4_MOE",
)  # fmt: skip
# [ 1/ 9]  blk.0.attn_v.weight - [ 512, 256, 1, 1], type = f16, size = 1.00 MiB -> 0.25 MiB (q4_K)
_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +\S+, size = .*?MiB(?: -> .*\((\S+)\))?$", re.M)


def shapes_of(
    *, width: int, ffn: int, heads: tuple[int, int], vocab: int = 1024, experts: int = 0, head_dim: int = 0,
    is_tied: bool = False, is_fused: bool = False,
) -> dict[str, list[int]]:  # fmt: skip
    """Shape of each tensor, outermost axis first; blk.* stands for all layers."""
    queries, values = (count * (head_dim or width // heads[0]) for count in heads)
    stack = [experts] if experts else []
    suffix = "_exps" if experts else ""
    shapes = {"token_embd": [vocab, width], "output_norm": [width], "blk.*.attn_norm": [width]}
    if not is_tied:
        shapes["output"] = [vocab, width]
    if is_fused:
        shapes |= {"blk.*.attn_qkv": [queries + 2 * values, width], "blk.*.ffn_up": [2 * ffn, width]}
    else:
        shapes |= {"blk.*.attn_q": [queries, width], "blk.*.attn_k": [values, width], "blk.*.attn_v": [values, width]}
        shapes |= {f"blk.*.ffn_{part}{suffix}": [*stack, ffn, width] for part in ("gate", "up")}
    shapes |= {"blk.*.attn_output": [width, queries], f"blk.*.ffn_down{suffix}": [*stack, width, ffn]}
    if experts:
        shapes["blk.*.ffn_gate_inp"] = [experts, width]
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def model(architecture: str, layers: int, heads: tuple[int, int], experts: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "block_count": layers,
        "head_count": heads[0],
        "head_count_kv": heads[1],
        "expert_count": experts,
        "shapes": shapes_of(heads=heads, experts=experts, **more),
    }


# Layers and heads as in the models named; widths only where what divides them matters.
MODELS = {
    "the shipped model": model("llama", 4, (8, 4), width=512, ffn=1280, vocab=4096, is_tied=True),
    "Llama 2 7B": model("llama", 32, (32, 32), width=4096, ffn=11008),
    "Llama 3 8B": model("llama", 32, (32, 8), width=4096, ffn=14336),
    "Llama 65B": model("llama", 80, (64, 64), width=1024, ffn=2048),
    "Llama 3 70B": model("llama", 80, (64, 8), width=1024, ffn=2048),
    "Qwen2 0.5B": model("qwen2", 24, (14, 2), width=896, ffn=4864, is_tied=True),
    "Qwen2 72B": model("qwen2", 80, (64, 8), width=1024, ffn=2048),
    "Qwen3 30B-A3B": model("qwen3moe", 48, (32, 4), 128, width=2048, ffn=768, head_dim=128),
    "Mixtral 8x7B": model("llama", 32, (32, 8), 8, width=1024, ffn=2048),
    "Mixtral of 80 layers": model("llama", 80, (32, 8), 8, width=1024, ffn=2048),
    "four experts": model("llama", 17, (8, 8), 4, width=512, ffn=768),
    "Gemma 2 2B": model("gemma2", 26, (8, 4), width=2304, ffn=9216, head_dim=256, is_tied=True),
    "Phi 3 mini": model("phi3", 32, (32, 32), width=3072, ffn=8192, is_fused=True),
    "blocks of 32 alone": model("llama", 9, (4, 4), width=288, ffn=736),
    "no blocks": model("llama", 3, (4, 4), width=48, ffn=512, vocab=64),
}


def write_holes(path: Path, one: dict[str, Any]) -> None:
    """A GGUF file of F16 with all that llama-quantize asks for, and a hole for its weights."""
    name = one["architecture"]
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(one["block_count"])
    writer.add_context_length(512)
    writer.add_embedding_length(one["shapes"]["token_embd.weight"][1])
    ffn = next(shape for tensor, shape in one["shapes"].items() if "ffn_down" in tensor)[-1]
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(one["head_count"])
    writer.add_head_count_kv(one["head_count_kv"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(one["shapes"]["token_embd.weight"][0])
    writer.add_sliding_window(512)
    if one["expert_count"]:
        writer.add_expert_count(one["expert_count"])
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(ffn)
    total = 0
    for tensor, shape in expanded(one).items():
        size = 2 * int(np.prod(shape))
        writer.add_tensor_info(tensor, shape, np.dtype(np.float16), size)
        total += size + 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + total + 32)


def expanded(one: dict[str, Any]) -> dict[str, list[int]]:
    return {
        tensor.replace("*", str(layer)): shape
        for tensor, shape in one["shapes"].items()
        for layer in range(one["block_count"] if "*" in tensor else 1)
    }


def write_importance(path: Path) -> None:
    """An importance matrix of one tensor that no model has: that there is one is what changes the mixes."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("none.in_sum2", np.ones((1, 32), np.float32))
    writer.add_tensor("none.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(tool: str, file: Path, preset: str, importance: Path | None) -> dict[str, str]:
    """The types of all tensors; of layers in order, equal ones counted: "q6_K*2 q4_K"."""
    options = [] if importance is None else ["--imatrix", str(importance)]
    command = [tool, "--dry-run", *options, str(file), preset]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, list[tuple[int, str]]] = {}
    for name, kind in _LINE.findall(done.stdout + done.stderr):
        layer = re.match(r"blk\.(\d+)\.", name)
        key = re.sub(r"^blk\.\d+\.", "blk.*.", name)
        found.setdefault(key, []).append((int(layer[1]) if layer else 0, kind or "keep"))
    return {key: counted([kind for _, kind in sorted(found[key])]) for key in sorted(found)}


def counted(kinds: list[str]) -> str:
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)


def main() -> None:
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        file, importance = Path(directory, "model.gguf"), Path(directory, "imatrix.gguf")
        write_importance(importance)
        for name, one in MODELS.items():
            write_holes(file, one)
            types = {}
            for preset in PRESETS:
                types[preset] = ask(sys.argv[1], file, preset, None)
                informed = ask(sys.argv[1], file, preset, importance)
                if informed != types[preset]:
                    types[f"{preset} with importance"] = informed
            tables[name] = {**one, "types": types}
            print(name, file=sys.stderr)
    print(shown(tables))


def shown(tables: dict[str, Any]) -> str:
    """JSON with a line for each mix."""
    text = json.dumps(tables, indent=1)
    # Whatever holds no object of its own.
    return re.sub(r"(?<=: )(\{[^{}]*\}|\[[^\[\]]*\])", lambda found: " ".join(found[0].split()), text)


if __name__ == "__main__":
    main()
