"""Quantize a model with HQQ as its user would, without data; see benchmarks/peers/common.py.

`hqq` is its default solver (20 proximal steps, l_0.7), `minmax` the same without them: scale and zero point from the
smallest and largest weight of each group. Groups along the input (axis 1, what its kernels take), scales and zero
points in float16; decoded as (code - zero) * scale in float32. The output head stays in float. The artefact is dense.
"""

from __future__ import annotations

from benchmarks.peers import common  # isort: skip - sets the environment before any library is imported

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKAGES = ("hqq", "transformers", "torch")
SOLVERS = {"hqq": False, "minmax": False}


def quantize(arguments: argparse.Namespace, clock: common.Clock) -> dict[str, Any]:
    """Run the library from the imports to the saved model."""
    with clock.phase("import"):
        import torch
        from transformers import AutoTokenizer

    if arguments.scheme.zero != "float16":
        raise ValueError("HQQ has a float zero point: give intN-gG-offset or intN-channel-offset")
    with clock.phase("load"):
        model = common.load_model(arguments.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    widths = common.linear_widths(model)
    in_float = common.indivisible(widths, arguments.scheme)
    bytes_of: dict[str, int] = {}
    with clock.phase("quantize"), torch.no_grad():
        for name in [name for name in widths if name not in in_float]:
            linear = model.get_submodule(name)
            bytes_of[f"{name}.weight"] = arguments.scheme.storage_bytes(*linear.weight.shape)
            linear.weight = torch.nn.Parameter(decoded(linear, arguments.scheme, solver=arguments.solver))
    with clock.phase("save"):
        model.save_pretrained(arguments.out)
        tokenizer.save_pretrained(arguments.out)
    common.write_storage(arguments.out, bytes_of)
    return {"dtype": str(model.dtype).removeprefix("torch."), "left_in_float": in_float}


def decoded(linear: nn.Linear, scheme: common.WeightScheme, *, solver: str) -> Tensor:
    """The weight of `linear` as HQQ stores it, float32."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    config = BaseQuantizeConfig(nbits=scheme.bits, group_size=scheme.group, axis=1)
    config["weight_quant_params"]["optimize"] = solver == "hqq"
    held = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
    # The stored tensors are float16; the arithmetic of the judges is float32.
    meta = {**held.meta, "compute_dtype": torch.float32}
    meta["scale"], meta["zero"] = meta["scale"].float(), meta["zero"].float()
    weight: Tensor = Quantizer.dequantize(held.W_q, meta)
    return weight


if __name__ == "__main__":
    common.answer(common.parse_arguments(__doc__, SOLVERS), quantize, PACKAGES)
