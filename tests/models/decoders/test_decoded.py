from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pennyweight.core.errors import CheckpointError
from pennyweight.core.registry import provided
from pennyweight.models.decoders import decoded
from tests.models.checkpoints import stored

FLOATS = {"l.weight": torch.ones(2, 2)}
FP8 = {"l.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(1, 1)}


def test_the_folder_is_scanned_for_decoders() -> None:
    assert list(provided("models.decoders")) == ["awq", "compressed-tensors", "fp8", "gptq", "mxfp4"]


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {}}, {"text_config": "x"}])
def test_a_checkpoint_of_floats_is_returned_as_it_is(config: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, FLOATS)
    assert decoded(checkpoint, config) is checkpoint


@pytest.mark.parametrize("method", ["bitsandbytes", "fbgemm_fp8", None, 3, ["fp8"]])
def test_an_unknown_kind_is_refused_by_name(method: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="known are awq, compressed-tensors, fp8, gptq, mxfp4") as raised:
        decoded(stored(tmp_path, FLOATS), {"quantization_config": {"quant_method": method}})
    assert repr(method) in str(raised.value)


def test_a_config_without_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    for method in ("awq", "fp8", "gptq", "mxfp4"):
        with pytest.raises(CheckpointError, match=f"quantized with {method}, but no tensor is. Remove"):
            decoded(stored(tmp_path, FLOATS), {"quantization_config": {"quant_method": method}})


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": "float64"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_the_type_is_the_models_else_that_of_the_scales(
    config: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = decoded(stored(tmp_path, FP8), config | {"quantization_config": {"quant_method": "fp8"}})
    assert checkpoint.read("l.weight").dtype == checkpoint.tensors["l.weight"].dtype == dtype


def test_the_config_of_the_language_part_counts(tmp_path: Path) -> None:
    plain = stored(tmp_path, FP8)
    checkpoint = decoded(plain, {"text_config": {"quantization_config": {"quant_method": "fp8"}}})
    assert checkpoint.decoded_from == "fp8 weights with one scale per tensor"
    assert (checkpoint.path, checkpoint.weight_files) == (plain.path, plain.weight_files)


def test_what_was_replaced_can_no_longer_be_read(tmp_path: Path) -> None:
    checkpoint = decoded(stored(tmp_path, FP8), {"quantization_config": {"quant_method": "fp8"}})
    assert set(checkpoint.tensors) == {"l.weight"}
    with pytest.raises(CheckpointError, match="'l.weight_scale_inv' is part of a quantized weight"):
        checkpoint.read("l.weight_scale_inv")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(threads: int, tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(4096).reshape(4096, 256).view(torch.float8_e4m3fn)
    scales = torch.rand(32, 2, generator=torch.Generator().manual_seed(1))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    checkpoint = decoded(stored(tmp_path, {"l.weight": codes, "l.weight_scale_inv": scales}), config)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = checkpoint.read("l.weight")
    finally:
        torch.set_num_threads(before)
    full = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(found.nan_to_num(), (codes.float() * full).nan_to_num())
