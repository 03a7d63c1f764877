"""Makes the JSON files beside it: what llama.cpp's own converter says about tiny models of each family.

    python -m tests.golden.gguf.make LLAMA_CPP_DIRECTORY

with the directory of llama.cpp's sources (those here: ggml-org/llama.cpp@0c1e57098) and transformers. The
converter knows a byte-level tokenizer by a hash and not that of the demo model: its look-up is replaced by the answer,
"gpt-2". sentencepiece.model was trained on the demo model's held-out.txt by the sentencepiece package:
vocab_size=600, model_type=bpe, byte_fallback, normalization_rule_name=identity, remove_extra_whitespaces=False,
user_defined_symbols=[<mask>, two ▁], unk_id=0, bos_id=1, eos_id=2, split_digits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.models.gguf.tiny import GOLDEN, MODELS, digest, directory_name, plain, write_model


def main(llama_cpp: str) -> None:
    for name in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            config, shapes = _checkpoint(name, Path(scratch) / "model")
            model = write_model(Path(scratch) / directory_name(name), config, shapes)
            out = Path(scratch) / "model.gguf"
            subprocess.run([sys.executable, "-m", __spec__.name, "--convert", llama_cpp, model, out], check=True)
            facts = {"config": config, "tensors": shapes, **_facts(out)}
        (GOLDEN / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def _checkpoint(name: str, path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """config.json, and name and shape of each tensor, as transformers saves them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = MODELS[name]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(path)
    with safe_open(path / "model.safetensors", "pt") as file:
        shapes = {tensor: file.get_slice(tensor).get_shape() for tensor in file.keys()}  # noqa: SIM118
    return json.loads((path / "config.json").read_text()), shapes


def _facts(file: Path) -> dict[str, Any]:
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {
        key: [[kind.name for kind in field.types], plain(field.contents())]
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key not in ("general.file_type", "general.quantization_version")
    }
    stored = {
        tensor.name: [tensor.tensor_type.name, [int(n) for n in reversed(tensor.shape)], digest(tensor.data.tobytes())]
        for tensor in reader.tensors
    }
    return {"fields": fields, "stored": stored}


def convert(llama_cpp: str, model: str, out: str) -> None:
    sys.path[:0] = [f"{llama_cpp}/gguf-py", llama_cpp]
    # The converter comes with a gguf package of its own.
    import transformers

    sys.argv = ["convert", model, "--outfile", out, "--outtype", "f32"]
    transformers.AutoTokenizer.from_pretrained = transformers.PreTrainedTokenizerFast.from_pretrained
    import conversion.base
    import convert_hf_to_gguf

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    if sys.argv[1] == "--convert":
        convert(*sys.argv[2:])
    else:
        main(sys.argv[1])
