from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.models.decoders import decoded
from tests.models.checkpoints import same_bits, stored


def opened(directory: Path, tensors: dict[str, Tensor], dtype: str | None = "bfloat16") -> Checkpoint:
    return decoded(stored(directory, tensors), {"torch_dtype": dtype, "quantization_config": {"quant_method": "mxfp4"}})


def experts(count: int = 3, out: int = 8, groups: int = 5) -> dict[str, Tensor]:
    blocks = torch.randint(0, 256, (count, out, groups, 16), dtype=torch.uint8)
    scales = torch.randint(0, 256, (count, out, groups), dtype=torch.uint8)
    return {
        "mlp.experts.up_blocks": blocks,
        "mlp.experts.up_scales": scales,
        "mlp.experts.up_bias": torch.ones(count, out),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_it_agrees_bit_for_bit_with_transformers(dtype: str | None, tmp_path: Path) -> None:
    """Every code and every scale, also those that overflow: 2**128 in float32."""
    saved = experts(out=64)
    checkpoint = opened(tmp_path, saved, dtype)
    out = getattr(torch, dtype or "bfloat16")
    blocks, scales = saved["mlp.experts.up_blocks"], saved["mlp.experts.up_scales"]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=out)
    assert same_bits(checkpoint.read("mlp.experts.up"), expected)
    assert same_bits(checkpoint.read("mlp.experts.up", slice(1, 3)), expected[1:3])
    assert checkpoint.tensors["mlp.experts.up"] == TensorInfo(out, (3, 160, 64))
    assert set(checkpoint.tensors) == {"mlp.experts.up", "mlp.experts.up_bias"}
    assert checkpoint.decoded_from == "mxfp4 weights, one e8m0 scale per 32"


def test_the_first_value_is_in_the_low_half(tmp_path: Path) -> None:
    blocks = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 0x7A  # 6.0 above, -1.0 below
    checkpoint = opened(tmp_path, {"x_blocks": blocks, "x_scales": torch.full((1, 1, 1), 128, dtype=torch.uint8)})
    assert checkpoint.read("x")[0, :3, 0].tolist() == [-2.0, 12.0, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_scales": None}, "'x' cannot be decoded without 'x_scales'"),
        (
            {"x_scales": torch.zeros(1, 2, 4, dtype=torch.uint8)},
            r"'x_scales' is uint8 \[1, 2, 4\], expected .* \[1, 2, 3\]",
        ),
        ({"x_scales": torch.zeros(1, 2, 3)}, "'x_scales' is float32"),
        ({"x_blocks": torch.zeros(2, 3, 16, dtype=torch.uint8)}, "'x_blocks' is uint8"),
        ({"x_blocks": torch.zeros(1, 2, 3, 8, dtype=torch.uint8)}, "'x_blocks' is uint8"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    sound = {
        "x_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8),
        "x_scales": torch.zeros(1, 2, 3, dtype=torch.uint8),
    }
    tensors = {name: tensor for name, tensor in (sound | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors)
