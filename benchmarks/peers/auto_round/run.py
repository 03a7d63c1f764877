"""Quantize a model with AutoRound as its user would; see benchmarks/peers/common.py.

Everything not on the command line is the library's default: 200 iterations a block of signed gradient descent on the
rounding and on the ranges, learning rate 1/200, 8 windows a step, each block fed by the quantized blocks before it, the
parameters of the lowest loss kept. Scales take the checkpoint's type (the default is float16, of the same size). The
output head stays in float. The artefact is dense: the weights as the library decodes them, in the type it computes in
(bfloat16 on a processor that has it). Its own format "fake" is not used: 0.16.1 was seen to save the original there.
"""

from __future__ import annotations

from benchmarks.peers import common  # isort: skip - sets the environment before any library is imported

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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
            # Otherwise finished blocks go to disk, and the model that is left has the original's.
            low_cpu_mem_usage=False,
        )
        originals = {name: model.get_submodule(name).weight.detach().clone() for name in shapes}
        tuned, _ = tuner.quantize()
    quantized = quantized_linears(tuned, originals)
    with clock.phase("save"):
        tuned.save_pretrained(arguments.out)
        tokenizer.save_pretrained(arguments.out)
    common.write_storage(
        arguments.out,
        {
            f"{name}.weight": scheme.storage_bytes(*shape, scale_bits=8 * dtype.itemsize)
            for name, shape in shapes.items()
            if name in quantized
        },
    )
    return {
        # The library casts the model to the type it computes in.
        "dtype": str(tuned.dtype).removeprefix("torch."),
        "left_in_float": [name for name in shapes if name not in quantized],
    }


def quantized_linears(tuned: Any, originals: dict[str, Tensor]) -> list[str]:
    """Those that have a scale now; the library leaves others, of widths that 32 does not divide, in float.

    Raises RuntimeError where there is none, or where one is still the original's: a copy of it was quantized then.
    """
    found = [name for name in originals if getattr(tuned.get_submodule(name), "scale", None) is not None]
    same = [name for name in found if tuned.get_submodule(name).weight.float().equal(originals[name].float())]
    if same or not found:
        raise RuntimeError(
            f"AutoRound quantized {len(found)} weights, {len(same)} of them are as they were: {same[:1]}"
        )
    return found


if __name__ == "__main__":
    common.answer(common.parse_arguments(__doc__, SOLVERS), quantize, PACKAGES)
