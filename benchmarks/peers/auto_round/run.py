"""Quantize a model with AutoRound as its user would; see benchmarks/peers/common.py.

Everything not on the command line is the library's default: 200 iterations a block of signed gradient descent on the
rounding and on the ranges, learning rate 1/200, 8 windows a step, each block fed by the quantized blocks before it, the
parameters of the lowest loss kept. Scales take the checkpoint's type (the default is float16, of the same size). The
output head stays in float. The artefact is dense (the library's format "fake"): the weights as it decodes them.
"""

from __future__ import annotations

from benchmarks.peers import common  # isort: skip - sets the environment before any library is imported

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

PACKAGES = ("auto-round", "transformers", "torch")
SOLVERS = {"auto-round": True}
_SHORT = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


def quantize(arguments: argparse.Namespace, clock: common.Clock) -> dict[str, Any]:
    """Run the library from the imports to the saved model."""
    with clock.phase("import"):
        from auto_round import AutoRound
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

    with clock.phase("load"):
        model = common.load_model(arguments.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        windows = load_file(arguments.tokens)["input_ids"]
    scheme, dtype = arguments.scheme, model.dtype
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in common.linear_widths(model)}
    in_float = common.indivisible({name: shape[1] for name, shape in shapes.items()}, scheme)
    with clock.phase("quantize"):
        tuner = AutoRound(
            model,
            tokenizer,
            bits=scheme.bits,
            group_size=-1 if scheme.group is None else scheme.group,
            sym=scheme.is_symmetric,
            layer_config={name: {"bits": 16} for name in in_float},
            dataset=[window[None] for window in windows],
            nsamples=len(windows),
            seqlen=windows.shape[1],
            scale_dtype=_SHORT[str(dtype)],
            device_map="cpu",
        )
        _, folders = tuner.quantize_and_save(str(arguments.out), format="fake")
    make_plain(Path(folders[0] if isinstance(folders, list) else folders), arguments.out)
    common.write_storage(
        arguments.out,
        {
            f"{name}.weight": scheme.storage_bytes(*shape, scale_bits=8 * dtype.itemsize)
            for name, shape in shapes.items()
            if name not in in_float
        },
    )
    # The library casts the model to the type it computes in.
    return {"dtype": str(model.dtype).removeprefix("torch."), "left_in_float": in_float}


def make_plain(folder: Path, out: Path) -> None:
    """Move what was saved up to `out`, without what makes readers look for packed weights: there are none."""
    for file in list(folder.iterdir()) if folder != out else []:
        shutil.move(file, out / file.name)
    if folder != out:
        folder.rmdir()
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    common.answer(common.parse_arguments(__doc__, SOLVERS), quantize, PACKAGES)
