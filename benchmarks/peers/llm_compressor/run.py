"""Quantize a model with llm-compressor as its user would; see benchmarks/peers/common.py.

Everything not on the command line is the library's default: checkpoint dtype, min-max scales; GPTQ with 1 % damping and
columns in blocks of 128; AWQ with 20 grid points, scaled by activations and weights, and then rounding to nearest;
sequential calibration. The output head stays in float. The artefact is packed (compressed-tensors).

Without an accelerator AWQ 0.14 stops because it pins memory for one; the runner leaves the pinning out, which changes
no number.
"""

from __future__ import annotations

from benchmarks.peers import common  # isort: skip - sets the environment before any library is imported

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch")
SOLVERS = {"nearest": False, "gptq": True, "awq": True}


def make_recipe(scheme: common.WeightScheme, *, solver: str, ignore: list[str]) -> list[Any]:
    """The library's recipe for `scheme`: its own W{bits}A16 preset, with this group size and symmetry."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.is_symmetric,
        strategy="channel" if scheme.group is None else "group",
        group_size=scheme.group,
    )
    options: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ignore,
    }
    if solver == "gptq":
        return [GPTQModifier(**options)]
    nearest = QuantizationModifier(**options)
    if solver == "nearest":
        return [nearest]
    leave_memory_unpinned()
    return [AWQModifier(), nearest]


def leave_memory_unpinned() -> None:
    """Where there is no accelerator there is nothing to pin memory for."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *arguments: None


def calibration_loader(tokens: Path) -> DataLoader[dict[str, Any]]:
    """One window a batch, in the order of the file, as it is: no padding, no truncation, no shuffling."""
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader

    held = load_file(tokens)
    windows = held["input_ids"].split(held["lengths"].tolist()) if "lengths" in held else held["input_ids"]
    samples = [{"input_ids": window, "attention_mask": window.new_ones(window.shape)} for window in windows]
    return DataLoader(cast("Dataset[dict[str, Any]]", samples), batch_size=1)


def quantize(arguments: argparse.Namespace, clock: common.Clock) -> dict[str, Any]:
    """Run the library from the imports to the saved model."""
    with clock.phase("import"):
        from llmcompressor import oneshot
        from transformers import AutoTokenizer

    with clock.phase("load"):
        model = common.load_model(arguments.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with clock.phase("quantize"):
        widths = common.linear_widths(model)
        # llm-compressor stops with a ValueError that says to ignore these; this runner does as told.
        in_float = common.indivisible(widths, arguments.scheme)
        ignore = [*in_float, *outside_of_blocks(model, widths)]
        recipe = make_recipe(arguments.scheme, solver=arguments.solver, ignore=ignore)
        data = {} if arguments.tokens is None else {"dataset": calibration_loader(arguments.tokens)}
        oneshot(model=model, processor=tokenizer, recipe=recipe, **data)
    with clock.phase("save"):
        model.save_pretrained(arguments.out, save_compressed=True)
        tokenizer.save_pretrained(arguments.out)
    return {"dtype": str(model.dtype).removeprefix("torch."), "left_in_float": in_float}


def outside_of_blocks(model: Any, widths: dict[str, int]) -> list[str]:
    """The linears that are not quantized by choice: heads and poolers."""
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in widths]


if __name__ == "__main__":
    common.answer(common.parse_arguments(__doc__, SOLVERS), quantize, PACKAGES)
