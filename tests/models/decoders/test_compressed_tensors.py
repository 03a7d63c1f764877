from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from pennyweight.core.errors import CheckpointError
from pennyweight.models.base import Checkpoint
from pennyweight.models.decoders import decoded
from tests.models.checkpoints import same_bits, stored


def weights(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | changes


def group(*targets: str, **changes: Any) -> dict[str, Any]:
    return {"targets": list(targets or ["Linear"]), "weights": weights(**changes)}


def opened(
    directory: Path, tensors: dict[str, Tensor], *groups: dict[str, Any], dtype: str | None = None, **settings: Any
) -> Checkpoint:
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {f"group_{i}": found for i, found in enumerate(groups)},
    }
    return decoded(stored(directory, tensors), {"dtype": dtype, "quantization_config": quantization | settings})


def layer(
    name: str = "l", *, out: int = 40, inputs: int = 96, scale_dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """A layer as compressed-tensors' own compressor stores it, and the weight that its decompressor gives."""
    args = weights(**changes)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    groups = {"group": inputs // (args["group_size"] or 1), "channel": 1, "tensor": 1}[args["strategy"]]
    shape = (1,) if args["strategy"] == "tensor" else (out, groups)
    high = 1 << (args["num_bits"] - 1)
    state = {
        "weight": torch.randn(out, inputs).to(scale_dtype),
        "weight_scale": (torch.rand(shape) / high).to(scale_dtype),
    }
    if not args["symmetric"]:
        state["weight_zero_point"] = torch.randint(-high, high, shape, dtype=torch.int8)
    packed = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    return {f"{name}.{part}": tensor for part, tensor in packed.items()}, expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "size"), [("group", 32), ("channel", None), ("tensor", None)])
def test_it_decodes_as_the_library_itself_does(
    bits: int, symmetric: bool, strategy: str, size: int | None, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": size}
    tensors, expected = layer(**changes)
    checkpoint = opened(tmp_path, tensors | {"l.bias": torch.ones(40)}, group(**changes))
    assert same_bits(checkpoint.read("l.weight"), expected)
    assert same_bits(checkpoint.read("l.weight", slice(3, 17)), expected[3:17])
    assert same_bits(checkpoint.read("l.weight", slice(2, 2)), expected[2:2])
    assert set(checkpoint.tensors) == {"l.weight", "l.bias"}
    assert checkpoint.tensors["l.weight"].shape == (40, 96)
    assert checkpoint.decoded_from == f"compressed-tensors int{bits} weights"


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_arithmetic_is_in_the_type_of_the_scales(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, expected = layer(scale_dtype=scale_dtype, symmetric=False)
    checkpoint = opened(tmp_path, tensors, group(symmetric=False), dtype="float32")
    assert same_bits(checkpoint.read("l.weight"), expected.float())


def test_an_input_width_that_fills_no_word_decodes(tmp_path: Path) -> None:
    tensors, expected = layer(out=5, inputs=21, num_bits=3, strategy="channel", group_size=None)
    checkpoint = opened(tmp_path, tensors, group(num_bits=3, strategy="channel", group_size=None))
    assert same_bits(checkpoint.read("l.weight"), expected)


def test_name_goes_before_pattern_and_pattern_before_class(tmp_path: Path) -> None:
    bits = {"a.q_proj": 3, "a.k_proj": 8, "a.v_proj": 4}
    layers = {name: layer(name, num_bits=width) for name, width in bits.items()}
    tensors = {name: tensor for found, _ in layers.values() for name, tensor in found.items()}
    groups = (group("Linear", num_bits=4), group("re:.*[qk]_proj", num_bits=8), group("a.q_proj", num_bits=3))
    checkpoint = opened(tmp_path, tensors, *groups)
    assert all(same_bits(checkpoint.read(f"{name}.weight"), expected) for name, (_, expected) in layers.items())
    assert checkpoint.decoded_from == "compressed-tensors int3 and int4 and int8 weights"


def test_between_classes_what_is_stored_decides(tmp_path: Path) -> None:
    linear, embedding = layer("l"), layer("embed", num_bits=8, strategy="channel", group_size=None)
    groups = (group("Linear"), group("Embedding", num_bits=8, strategy="channel", group_size=None))
    checkpoint = opened(tmp_path, linear[0] | embedding[0], *groups)
    assert same_bits(checkpoint.read("l.weight"), linear[1])
    assert same_bits(checkpoint.read("embed.weight"), embedding[1])


def test_ignored_layers_and_scales_of_activations_are_left_alone(tmp_path: Path) -> None:
    tensors, _ = layer()
    extra = {"lm_head.weight": torch.ones(2, 2), "l.input_scale": torch.ones(1)}
    checkpoint = opened(tmp_path, tensors | extra, group(), ignore=["lm_head"])
    assert set(checkpoint.tensors) == {"l.weight", "lm_head.weight"}


def test_columns_in_the_order_of_g_idx_decode_with_the_scale_of_their_group(tmp_path: Path) -> None:
    tensors, expected = layer(symmetric=False)
    order = torch.randperm(96)
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

    codes = unpack_from_int32(tensors["l.weight_packed"], 4, torch.Size((40, 96)))
    moved = tensors | {
        "l.weight_packed": pack_to_int32(codes[:, order].contiguous(), 4),
        "l.weight_g_idx": (order // 32).int(),
    }
    checkpoint = opened(tmp_path, moved, group(symmetric=False))
    assert same_bits(checkpoint.read("l.weight"), expected[:, order])
    assert same_bits(checkpoint.read("l.weight", slice(1, 9)), expected[1:9, order])
    plain = tensors | {"l.weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}
    assert same_bits(opened(tmp_path, plain, group(symmetric=False)).read("l.weight"), expected)
    bad = tensors | {"l.weight_g_idx": torch.zeros(96, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match="'l.weight_g_idx' must give each group 32 inputs"):
        opened(tmp_path, bad, group(symmetric=False)).read("l.weight")


def test_zero_points_of_older_files_are_not_packed(tmp_path: Path) -> None:
    tensors, _ = layer(symmetric=False)
    scales = tensors["l.weight_scale"]
    zeros = torch.randint(-8, 8, tuple(scales.shape), dtype=torch.int8)
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    values = unpack_from_int32(tensors["l.weight_packed"], 4, torch.Size((40, 96))).reshape(40, 3, 32)
    expected = ((values - zeros[..., None]).bfloat16() * scales[..., None]).reshape(40, 96)
    checkpoint = opened(tmp_path, tensors | {"l.weight_zero_point": zeros}, group(symmetric=False))
    assert same_bits(checkpoint.read("l.weight", slice(7, 9)), expected[7:9])


def test_the_older_key_of_the_config_is_read(tmp_path: Path) -> None:
    tensors, expected = layer()
    config = {"compression_config": {"format": "pack-quantized", "config_groups": {"group_0": group()}}}
    assert same_bits(decoded(stored(tmp_path, tensors), config).read("l.weight"), expected)


SOUND = layer()[0]
ZEROS_OF_TWO_GROUPS = {"l.weight_zero_point": torch.zeros(5, 2, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("tensors", "groups", "settings", "message"),
    [
        (SOUND, [group()], {"format": "int-quantized"}, "format 'int-quantized'; known are pack-quantized"),
        (SOUND, [group() | {"format": "marlin-24"}], {}, "format 'marlin-24'"),
        (SOUND, [], {}, "no 'config_groups'"),
        (SOUND, [{"targets": ["Linear"]}], {}, "'group_0' does not say how its weights are stored"),
        (SOUND, [group(type="float")], {}, "type 'float' with 4 bits"),
        (SOUND, [group(num_bits=1)], {}, "with 1 bits; known are 'int' with 2 to 8"),
        (SOUND, [group(strategy="block")], {}, "strategy 'block'"),
        (SOUND, [group(group_size=0)], {}, "group size 0"),
        (SOUND, [group(num_bits=8)], {}, "fits none of the config's groups that are for it .8 bits"),
        (SOUND, [group(group_size=48)], {}, "fits none"),
        (SOUND, [group(strategy="channel")], {}, "fits none"),
        (SOUND, [group(strategy="tensor")], {}, "fits none"),
        (SOUND, [group("other.name", "re:model.*")], {}, "there is none"),
        (SOUND, [group("re:(")], {}, "no regular expression"),
        (SOUND, [group()], {"ignore": ["re:l"]}, "'l' is packed, but the config lists it under 'ignore'"),
        (SOUND, [group(symmetric=False)], {}, "cannot be decoded without 'l.weight_zero_point'"),
        (SOUND | {"l.weight_shape": torch.tensor([40, -96])}, [group()], {}, "fits none"),
        (SOUND | {"l.weight_shape": torch.tensor([2**62, 2**62])}, [group()], {}, "fits none"),
        (SOUND | {"l.weight_shape": torch.tensor([40])}, [group()], {}, "'l.weight_shape' is int64"),
        (SOUND | {"l.weight_packed": SOUND["l.weight_packed"].float()}, [group()], {}, "fits none"),
        (SOUND | {"l.weight_scale": SOUND["l.weight_scale"].double()}, [group()], {}, "'l.weight_scale' is float64"),
        (SOUND | ZEROS_OF_TWO_GROUPS, [group(symmetric=False)], {}, "zero_point' is int32"),
        (SOUND | {"l.weight_zero_point": torch.zeros(5, 2)}, [group(symmetric=False)], {}, "zero_point' is float32"),
        ({k: v for k, v in SOUND.items() if k != "l.weight_scale"}, [group()], {}, "without 'l.weight_scale'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    tensors: dict[str, Tensor], groups: list[dict[str, Any]], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors, *groups, **settings)


def test_padded_words_of_older_libraries_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """3 bits of 96 inputs: 9 words densely, 10 with ten codes a word."""
    tensors, _ = layer(num_bits=3)
    padded = tensors | {"l.weight_packed": torch.zeros(40, 10, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"compressed-tensors 0\.18 or later \(older ones pad"):
        opened(tmp_path, padded, group(num_bits=3))


# ---- small floats

FLOATS = {
    "float-quantized": {"num_bits": 8, "strategy": "channel", "group_size": None},
    "mxfp8-quantized": {"num_bits": 8, "scale_dtype": "torch.uint8"},
    "mxfp4-pack-quantized": {"num_bits": 4, "scale_dtype": "torch.uint8"},
    "nvfp4-pack-quantized": {
        "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"
    },
}  # fmt: skip


def float_layer(kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """A layer as compressed-tensors' own compressor stores it, and the weight that its decompressor gives."""
    args = QuantizationArgs(**(weights(type="float") | FLOATS[kind]))
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kind)
    compressor = BaseCompressor.get_value_from_registry(kind)
    state = {
        "weight": torch.randn(40, 96).bfloat16(),
        "weight_scale": (torch.rand(40, 96 // (args.group_size or 96)) + 0.1).bfloat16(),
    }
    if "nvfp4" in kind:
        # No power of two: other programs write any number here.
        state["weight_global_scale"] = torch.tensor([1234.5])
    stored_parts = compressor.compress(state, scheme)
    decoded_weight = compressor.decompress(stored_parts, scheme)["weight"]
    return {f"l.{part}": tensor for part, tensor in stored_parts.items()}, decoded_weight


@pytest.mark.parametrize("kind", FLOATS)
def test_small_floats_decode_as_the_library_itself_does(kind: str, tmp_path: Path) -> None:
    tensors, expected = float_layer(kind)
    found = opened(tmp_path, tensors, group(**(FLOATS[kind] | {"type": "float"})), format=kind, dtype="bfloat16")
    assert list(found.tensors) == ["l.weight"]
    assert same_bits(found.read("l.weight"), expected.bfloat16())
    assert same_bits(found.read("l.weight", slice(3, 17)), expected[3:17].bfloat16())


@pytest.mark.parametrize("kind", FLOATS)
def test_small_floats_whose_scales_do_not_fit_are_refused(kind: str, tmp_path: Path) -> None:
    tensors, _ = float_layer(kind)
    tensors["l.weight_scale"] = tensors["l.weight_scale"][:7].contiguous()
    with pytest.raises(CheckpointError, match=r"l.weight_scale"):
        opened(tmp_path, tensors, group(**(FLOATS[kind] | {"type": "float"})), format=kind)
