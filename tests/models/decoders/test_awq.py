from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import Checkpoint
from pennyweight.models.coded import coded_tensors
from pennyweight.models.decoders import decoded
from tests.models.checkpoints import same_bits, stored

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def opened(directory: Path, tensors: dict[str, Tensor], **settings: Any) -> Checkpoint:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    return decoded(stored(directory, tensors), {"quantization_config": quantization | settings})


def packed(codes: Tensor) -> Tensor:
    """codes [n, out] -> int32 [n, out / 8], the nibbles of a word in AWQ's order, put together bit by bit."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for word in range(words.shape[1]):
        for place, output in enumerate(ORDER):
            words[:, word] |= codes[:, word * 8 + output] << (4 * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def linear(*, out: int = 24, inputs: int = 64, groups: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    codes, zeros = torch.randint(0, 16, (inputs, out)), torch.randint(0, 16, (groups, out))
    scales = torch.randn(groups, out).half()
    expected = torch.empty(out, inputs, dtype=torch.float16)
    for i in range(inputs):
        group = i // (inputs // groups)
        expected[:, i] = (codes[i] - zeros[group]).half() * scales[group]
    return {"l.qweight": packed(codes), "l.qzeros": packed(zeros), "l.scales": scales}, expected


@pytest.mark.parametrize(
    "part", [None, slice(0, 24), slice(3, 5), slice(7, 17), slice(8, 16), slice(-1, None), slice(4, 4)]
)
def test_it_decodes_what_an_independent_encoder_stored(part: slice | None, tmp_path: Path) -> None:
    tensors, expected = linear()
    checkpoint = opened(tmp_path, tensors | {"l.bias": torch.ones(24)})
    assert same_bits(checkpoint.read("l.weight", part), expected if part is None else expected[part])
    assert set(checkpoint.tensors) == {"l.weight", "l.bias"}
    assert checkpoint.tensors["l.weight"].shape == (24, 64)
    assert checkpoint.decoded_from == "awq weights of 4 bits"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"version": "gemv"}, "version 'gemv' with 4 bits; known is 'gemm'"),
        ({}, {"bits": 8}, "with 8 bits; known is 'gemm' with 4 bits"),
        ({"l.qzeros": None}, {}, "'l.weight' cannot be decoded without 'l.qzeros'"),
        ({"l.qzeros": torch.zeros(4, 4, dtype=torch.int32)}, {}, "'l.qzeros' is int32"),
        ({"l.qweight": torch.zeros(64, 4, dtype=torch.int32)}, {}, "'l.qweight' is int32"),
        ({"l.qweight": torch.zeros((), dtype=torch.int32)}, {}, "'l.qweight' is int32"),
        ({"l.scales": torch.zeros(4, 24, dtype=torch.int32)}, {}, "'l.scales' is int32"),
        ({"l.qweight": torch.zeros(63, 3, dtype=torch.int32)}, {}, "63 inputs in 4 groups"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Tensor | None], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in (linear()[0] | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors, **settings)


def test_its_codes_decode_to_the_same_weights(tmp_path: Path) -> None:
    tensors, expected = linear()
    coded = coded_tensors(opened(tmp_path, tensors))["l.weight"]
    assert coded is not None
    assert str(coded.scheme) == "uint4-g16-asym-f16"
    assert same_bits(coded.read().dequantize(torch.float16), expected)
