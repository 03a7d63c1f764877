from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import Checkpoint
from pennyweight.models.coded import coded_tensors
from pennyweight.models.decoders import decoded
from tests.models.checkpoints import same_bits, stored


def opened(directory: Path, tensors: dict[str, Tensor], dtype: str | None = None, **settings: Any) -> Checkpoint:
    config = {"dtype": dtype, "quantization_config": {"quant_method": "gptq", "bits": 4} | settings}
    return decoded(stored(directory, tensors), config)


def packed_columns(codes: Tensor, bits: int) -> Tensor:
    """codes [n, columns] -> int32 [n * bits / 32, columns]: each column is one long integer of Python's own."""
    words = -(-codes.shape[0] * bits // 32)
    out = np.zeros((words, codes.shape[1]), dtype=np.uint32)
    for column in range(codes.shape[1]):
        string = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, column].tolist()))
        out[:, column] = [(string >> (32 * word)) & 0xFFFFFFFF for word in range(words)]
    return torch.from_numpy(out.view(np.int32))


def linear(
    *, bits: int = 4, out: int = 32, inputs: int = 64, groups: int = 4, shift: int = 1, order: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one layer, and its weight [out, in] computed entry by entry in float16."""
    codes = torch.randint(0, 1 << bits, (inputs, out))
    zeros = torch.randint(0, 1 << bits, (groups, out))
    scales = torch.randn(groups, out).half()
    g_idx = torch.arange(inputs) // (inputs // groups)
    if order:
        g_idx = g_idx[torch.randperm(inputs)]
    expected = torch.empty(out, inputs, dtype=torch.float16)
    for i in range(inputs):
        expected[:, i] = scales[g_idx[i]] * (codes[i] - zeros[g_idx[i]]).half()
    stored_zeros = (zeros - shift) % (1 << bits)
    tensors = {
        "l.qweight": packed_columns(codes, bits),
        "l.qzeros": packed_columns(stored_zeros.T, bits).T,
        "l.scales": scales,
        "l.g_idx": g_idx.int(),
    }
    return tensors, expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
def test_it_decodes_what_an_independent_encoder_stored(bits: int, order: bool, kind: str, tmp_path: Path) -> None:
    tensors, expected = linear(bits=bits, order=order, shift=1 if kind == "gptq" else 0)
    checkpoint = opened(tmp_path, tensors | {"l.bias": torch.ones(32)}, bits=bits, checkpoint_format=kind)
    assert same_bits(checkpoint.read("l.weight"), expected)
    assert same_bits(checkpoint.read("l.weight", slice(5, 19)), expected[5:19])
    assert same_bits(checkpoint.read("l.weight", slice(-3, None)), expected[-3:])
    assert set(checkpoint.tensors) == {"l.weight", "l.bias"}
    assert checkpoint.decoded_from == f"gptq weights of {bits} bits"


def test_a_large_layer_decodes_the_same_in_chunks(tmp_path: Path) -> None:
    tensors, expected = linear(out=544, inputs=64)
    assert same_bits(opened(tmp_path, tensors).read("l.weight"), expected)


def test_without_g_idx_groups_are_consecutive(tmp_path: Path) -> None:
    tensors, expected = linear()
    del tensors["l.g_idx"]
    assert same_bits(opened(tmp_path, tensors).read("l.weight"), expected)


def test_the_type_of_the_model_is_the_last_cast(tmp_path: Path) -> None:
    tensors, expected = linear()
    checkpoint = opened(tmp_path, tensors, "bfloat16")
    assert checkpoint.tensors["l.weight"].dtype == torch.bfloat16
    assert same_bits(checkpoint.read("l.weight"), expected.bfloat16())


def test_layers_may_have_their_own_width_where_the_config_says_so(tmp_path: Path) -> None:
    tensors, expected = linear(bits=8)
    checkpoint = opened(tmp_path, tensors, bits=4, dynamic={"+:l": {"bits": 8}})
    assert same_bits(checkpoint.read("l.weight"), expected)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"checkpoint_format": "marlin"}, "format 'marlin'; known are gptq, gptq_v2"),
        ({}, {"bits": 8}, "holds 4 bits for each of 32 outputs, the config says 8"),
        ({"l.scales": None}, {}, "'l.weight' cannot be decoded without 'l.scales'"),
        ({"l.qzeros": torch.zeros(3, 4, dtype=torch.int32)}, {}, r"'l.qzeros' is int32 \[3, 4\], .* int32 \[4, 4\]"),
        ({"l.qzeros": torch.zeros((), dtype=torch.int32)}, {}, "holds 0 bits"),
        ({"l.qweight": torch.zeros(8, 31, dtype=torch.int32)}, {}, "'l.qweight' is int32"),
        ({"l.qweight": torch.zeros(8, 32)}, {}, "'l.qweight' is float32"),
        ({"l.scales": torch.zeros(())}, {}, "config says"),
        ({"l.g_idx": torch.full((64,), 4, dtype=torch.int32)}, {}, "'l.g_idx' has groups from 4 to 4, but there are 4"),
        ({"l.g_idx": torch.zeros(63, dtype=torch.int32)}, {}, "'l.g_idx' is int32"),
        ({"l.g_idx": None, "l.scales": torch.ones(5, 32).half(), "l.qzeros": torch.zeros(5, 4, dtype=torch.int32)}, {},
         "5 groups, which do not divide 64 inputs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    change: dict[str, Tensor | None], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in (linear()[0] | change).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors, **settings)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_its_codes_decode_to_the_same_weights(bits: int, groups: int, tmp_path: Path) -> None:
    tensors, expected = linear(bits=bits, groups=groups)
    coded = coded_tensors(opened(tmp_path, tensors, bits=bits))["l.weight"]
    assert coded is not None
    assert str(coded.scheme) == f"uint{bits}-g{64 // groups}-asym-f16"
    assert same_bits(coded.read().dequantize(torch.float16), expected)


def test_inputs_in_another_order_than_their_groups_have_no_codes(tmp_path: Path) -> None:
    assert coded_tensors(opened(tmp_path, linear(order=True)[0])) == {"l.weight": None}
