"""Quantize a model with the plan of AutoRound's AutoScheme; see benchmarks/peers/common.py.

    python -m benchmarks.peers.auto_round.scheme MODEL OUT --scheme 3.5 --solver auto-round|nearest --tokens FILE

The scheme is the average bits of the linear layers as the library counts them: with scales, and with zero points even
where there are none. It chooses among all its symmetric integer presets, 2 to 8 bits in groups of 32, 64 and 128. Its
scores take names of data sets alone, so its reader is replaced by one that gives the calibration windows, the first
32 of them: four times the tokens of its default. `auto-round` rounds with the library's defaults as run.py does,
`nearest` with its own rounding to nearest (`iters=0`, scales searched for). Scores are kept in AR_AUTO_SCHEME_CACHE.
"""

from __future__ import annotations

from benchmarks.peers import common  # isort: skip - sets the environment before any library is imported

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.auto_round.run import PACKAGES, quantized_linears

if TYPE_CHECKING:
    from torch import Tensor

# Solver -> iterations a block.
ITERATIONS = {"auto-round": 200, "nearest": 0}
_OPTIONS = [f"W{bits}A16{group}" for bits in range(2, 9) for group in ("", "G64", "G32")]
_WINDOWS = 32
_SHORT = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


def quantize(arguments: argparse.Namespace, clock: common.Clock) -> dict[str, Any]:
    """Run the library from the imports to the saved model."""
    with clock.phase("import"):
        from auto_round import AutoRound
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = load_file(arguments.tokens)["input_ids"]
    with clock.phase("plan"):
        plan = chosen(common.load_model(arguments.model, dtype="auto"), tokenizer, windows, arguments.scheme)
    model = common.load_model(arguments.model, dtype="auto")
    originals = {name: model.get_submodule(name).weight.detach().clone() for name in plan}
    with clock.phase("quantize"):
        tuner = AutoRound(
            model,
            tokenizer,
            layer_config={
                name: {"bits": scheme.bits, "group_size": scheme.group, "sym": True} for name, scheme in plan.items()
            },
            iters=ITERATIONS[arguments.solver],
            dataset=[window[None] for window in windows],
            nsamples=len(windows),
            seqlen=windows.shape[1],
            scale_dtype=_SHORT[str(model.dtype)],
            device_map="cpu",
            # Otherwise finished blocks go to disk, and the model that is left has the original's.
            low_cpu_mem_usage=False,
        )
        tuned, _ = tuner.quantize()
    _check(tuned, originals, plan)
    with clock.phase("save"):
        tuned.save_pretrained(arguments.out)
        tokenizer.save_pretrained(arguments.out)
    sizes = {f"{name}.weight": scheme.storage_bytes(*originals[name].shape) for name, scheme in plan.items()}
    common.write_storage(arguments.out, sizes)
    return {
        "dtype": str(tuned.dtype).removeprefix("torch."),
        "plan": {name: f"int{scheme.bits}-g{scheme.group}" for name, scheme in plan.items()},
    }


def chosen(model: Any, tokenizer: Any, windows: Tensor, average: float) -> dict[str, common.WeightScheme]:
    """The plan of AutoScheme: the scheme of every linear layer."""
    from auto_round import AutoScheme
    from auto_round.auto_scheme import delta_loss
    from auto_round.auto_scheme.gen_auto_scheme import GenScheme

    used = windows[:_WINDOWS]
    delta_loss.get_dataloader = _reader(used)
    wanted = AutoScheme(
        avg_bits=average, options=list(_OPTIONS), nsamples=len(used), seqlen=used.shape[1], low_cpu_mem_usage=False
    )
    # The name keys the kept scores.
    name = hashlib.sha256(used.numpy().tobytes()).hexdigest()
    linears = list(common.linear_widths(model))
    generator = GenScheme(wanted, model, linears, {}, name, device_map="cpu", tokenizer=tokenizer)
    found = generator.get_layer_config()
    return {one: common.WeightScheme(found[one]["bits"], found[one]["group_size"], "none") for one in linears}


def _reader(windows: Tensor) -> Callable[..., list[dict[str, Tensor]]]:
    import torch

    def read(tokenizer: Any, seqlen: int, *, bs: int, **names: Any) -> list[dict[str, Tensor]]:
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(bs)]

    return read


def _check(tuned: Any, originals: dict[str, Tensor], plan: dict[str, common.WeightScheme]) -> None:
    """Raises RuntimeError where the library did not round with the plan."""
    quantized_linears(tuned, originals)
    wrong = [
        name
        for name, scheme in plan.items()
        if (tuned.get_submodule(name).bits, tuned.get_submodule(name).group_size) != (scheme.bits, scheme.group)
    ]
    if wrong:
        raise RuntimeError(f"AutoRound rounded {len(wrong)} weights with another scheme than planned: {wrong[:1]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("out", type=Path, help="directory to write; must not exist, or be empty")
    parser.add_argument("--scheme", type=float, required=True, help="average bits of the linear layers")
    parser.add_argument("--solver", choices=tuple(ITERATIONS), required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="safetensors file with the calibration windows")
    return parser.parse_args()


if __name__ == "__main__":
    common.answer(_arguments(), quantize, PACKAGES)
