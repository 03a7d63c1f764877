from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import Checkpoint, TensorInfo
from pennyweight.models.decoders import decoded
from tests.models.checkpoints import entry, same_bits, stored, write_raw

FP8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def opened(
    directory: Path, tensors: dict[str, Tensor], *, dtype: str | None = "bfloat16", **settings: Any
) -> Checkpoint:
    return decoded(stored(directory, tensors), {"dtype": dtype, "quantization_config": BLOCKS | settings})


def all_codes(*shape: int, dtype: torch.dtype = FP8) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("codes", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_block_scales_decode_as_transformers_does(
    dtype: str, codes: torch.dtype, scale_dtype: torch.dtype, tmp_path: Path
) -> None:
    w, s = all_codes(384, 256, dtype=codes), torch.rand(3, 2).to(scale_dtype)
    checkpoint = opened(tmp_path, {"l.weight": w, "l.weight_scale_inv": s, "norm": torch.ones(3)}, dtype=dtype)
    out = getattr(torch, dtype)
    expected = Fp8Dequantize(None)._dequantize_one(w, s, output_dtype=out)  # type: ignore[no-untyped-call]
    assert same_bits(checkpoint.read("l.weight"), expected)
    assert checkpoint.tensors == {"l.weight": TensorInfo(out, (384, 256)), "norm": TensorInfo(torch.float32, (3,))}
    assert checkpoint.decoded_from == "fp8 weights with 128x128 block scales"


@pytest.mark.parametrize("rows", [(0, 300), (5, 131), (128, 256), (299, 300), (7, 7)])
def test_blocks_are_cut_off_at_the_edge(rows: tuple[int, int], tmp_path: Path) -> None:
    w, s = all_codes(300, 200), torch.rand(3, 2)
    checkpoint = opened(tmp_path, {"l.weight": w, "l.weight_scale_inv": s})
    expected = torch.empty(300, 200)
    for i in range(300):
        for j in range(0, 200, 128):
            expected[i, j : j + 128] = w[i, j : j + 128].float() * s[i // 128, j // 128]
    assert same_bits(checkpoint.read("l.weight", slice(*rows)), expected.bfloat16()[slice(*rows)])


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((), "one scale per tensor"), ((1,), "one scale per tensor"), ((6,), "one scale per channel"),
     ((6, 1), "one scale per channel"), ((3, 2), "2x4 block scales"), ((1, 2), "6x4 block scales")],
)  # fmt: skip
def test_other_grids_say_their_block_themselves(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    w, s = all_codes(6, 8), torch.rand(shape)
    checkpoint = opened(tmp_path, {"l.weight": w, "l.weight_scale": s}, dtype="float32", weight_block_size=None)
    grid = s.reshape(shape if len(shape) == 2 else (-1, 1))
    full = grid.repeat_interleave(6 // grid.shape[0], 0).repeat_interleave(8 // grid.shape[1], 1)
    assert same_bits(checkpoint.read("l.weight"), w.float() * full)
    assert same_bits(checkpoint.read("l.weight", slice(2, 5)), (w.float() * full)[2:5])
    assert checkpoint.decoded_from == f"fp8 weights with {kind}"


def test_exponent_scales_decode_with_and_without_their_type(tmp_path: Path) -> None:
    w, s = all_codes(4, 256), torch.tensor([[120, 130]], dtype=torch.uint8)
    expected = (w.float() * torch.tensor([2.0**-7, 2.0**3]).repeat_interleave(128)).bfloat16()
    assert same_bits(opened(tmp_path, {"l.weight": w, "l.weight_scale_inv": s}, dtype=None).read("l.weight"), expected)
    header = {
        "l.scale": entry(0, 2, dtype="F8_E8M0", shape=[1, 2]),
        "l.weight": entry(2, 1026, dtype="F8_E4M3", shape=[4, 256]),
    }
    write_raw(tmp_path / "model.safetensors", header, bytes([120, 130]) + w.view(torch.uint8).numpy().tobytes())
    from pennyweight.models.checkpoint import open_checkpoint

    checkpoint = decoded(open_checkpoint(tmp_path), {"quantization_config": BLOCKS})
    assert same_bits(checkpoint.read("l.weight"), expected)
    assert set(checkpoint.tensors) == {"l.weight"}


def test_stacked_experts_decode_one_by_one(tmp_path: Path) -> None:
    w, s = all_codes(3, 130, 140), torch.rand(3, 2, 2)
    checkpoint = opened(tmp_path, {"experts.up": w, "experts.up_scale_inv": s})
    full = s.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :130, :140]
    expected = (w.float() * full).bfloat16()
    assert same_bits(checkpoint.read("experts.up"), expected)
    assert same_bits(checkpoint.read("experts.up", slice(1, 3)), expected[1:3])
    assert same_bits(checkpoint.read("experts.up", slice(1, 1)), expected[1:1])


def test_scales_of_activations_go_and_other_tensors_stay(tmp_path: Path) -> None:
    tensors = {
        "l.weight": all_codes(4, 4), "l.weight_scale_inv": torch.rand(1, 1), "l.bias": torch.ones(4),
        "l.input_scale": torch.ones(1), "l.activation_scale": torch.ones(1), "l.k_scale": torch.ones(1),
        "other.k_scale": torch.ones(1),
    }  # fmt: skip
    checkpoint = opened(tmp_path, tensors)
    assert set(checkpoint.tensors) == {"l.weight", "l.bias", "other.k_scale"}
    assert checkpoint.read("l.bias", slice(0, 2)).tolist() == [1, 1]


def test_without_a_type_of_the_model_the_scales_give_it(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {"l.weight": all_codes(4, 4), "l.weight_scale_inv": torch.rand(1, 1)}, dtype=None)
    assert checkpoint.tensors["l.weight"].dtype == checkpoint.read("l.weight").dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"l.weight": all_codes(4, 4)}, "'l.weight' is stored in fp8 without scales; looked for l.weight_scale_inv"),
        ({"l.weight": all_codes(6, 4), "l.weight_scale_inv": torch.rand(4, 1)}, "does not fit the weight 'l.weight'"),
        ({"l.weight": all_codes(6, 4), "l.weight_scale_inv": torch.rand(1, 1, 1, 1)[..., [0, 0]]}, "does not fit"),
        ({"l.weight": all_codes(6, 4), "l.weight_scale_inv": torch.rand(0, 1)}, "does not fit"),
        ({"l.weight": all_codes(2, 6, 4), "l.weight_scale_inv": torch.rand(3, 1, 1)}, "does not fit"),
        ({"l.weight": all_codes(4), "l.weight_scale_inv": torch.rand(4)}, "known are matrices and stacks"),
        ({"l.weight": all_codes(4, 4), "l.weight_scale": torch.ones(1, dtype=torch.int32)}, "float scales"),
        (
            {"e.weight": torch.ones(4, 4, dtype=torch.int8), "e.weight_scale_inv": torch.rand(4, 1)},
            "packed 4-bit experts",
        ),
        ({"l.weight": torch.ones(4, 4)}, "quantized with fp8, but no tensor is"),
    ],
)
def test_what_does_not_fit_is_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors)
