"""The tensors of a site, against their description byte for byte and against their size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.containers.onnx.dialect import Dialect
from pennyweight.containers.onnx.rules import Form, block_of, size_bytes, stored_as, why_not, why_not_activation
from pennyweight.formats.integer import Int
from pennyweight.models.network import NetworkSite
from pennyweight.models.network.network import NetworkSiteKind
from pennyweight.schemes import Parameters, QuantizedWeight, Scheme, parse_scheme
from pennyweight.schemes.activation import ActivationScheme, parse_network_scheme

SHAPES: dict[str, tuple[int, ...]] = {
    "linear": (5, 48),
    "embedding": (7, 48),
    "conv": (4, 3, 4, 4),
    "recurrent": (8, 48),
}
DIALECTS = [Dialect(), Dialect("openvino"), Dialect(is_portable=True)]


def random_weight(site: NetworkSite, scheme: Scheme, seed: int) -> QuantizedWeight:
    """Any codes, scales of both signs, any zero points."""
    random = torch.Generator().manual_seed(seed)
    element = scheme.element
    assert isinstance(element, Int)
    codes = torch.randint(0, 1 << element.bits, site.matrix_shape, generator=random).to(torch.uint8)
    shape = scheme.scale_shape(site.matrix_shape)
    zeros = None
    if scheme.has_integer_zero:
        low = int(element.smallest)
        zeros = torch.randint(low, low + (1 << element.bits), shape, generator=random).to(torch.int16)
    elif scheme.zero is not None:
        zeros = torch.rand(shape, generator=random)
    return QuantizedWeight.of(codes, Parameters(torch.randn(shape, generator=random), zeros), scheme)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["linear", "embedding", "conv", "recurrent", "conv_transpose"]),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["tensor", "channel", "g16", "g24", "g48"]),
    st.sampled_from(["", "-asym", "-fzero"]),
    st.sampled_from(["integers", "blocks", "decoded"]),
    st.sampled_from(DIALECTS),
    st.integers(0, 1 << 16),
)
def test_codes_come_back_and_take_the_bytes_that_were_foretold(
    kind: Any, bits: int, signed: bool, shared: str, zero: str, form: Form, dialect: Dialect, seed: int
) -> None:
    scheme = parse_scheme(f"{'int' if signed else 'uint'}{bits}-{shared}{zero}-f32")
    shape = (4, 3, 12) if kind == "conv_transpose" else SHAPES[kind]
    if kind == "conv_transpose" and shared.startswith("g"):
        shape = (8, 3, 12)
    site = NetworkSite("site", kind, "site.weight", shape, 2 if kind == "conv_transpose" else 1)
    if form == "blocks" and block_of(site, scheme, dialect) is None:
        return
    stored = stored_as(site, scheme, form, dialect)
    weight = random_weight(site, scheme, seed)
    arrays = stored.arrays(weight)
    back = stored.weight(arrays)
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert weight.zeros is None or torch.equal(back.zeros, weight.zeros)  # type: ignore[arg-type]
    assert sum(len(array.data) for array in arrays.values()) == stored.size_bytes


def test_a_tensor_of_four_bits_lies_as_torch_has_it() -> None:
    site = NetworkSite("c", "conv", "c.weight", (2, 1, 3))
    weight = QuantizedWeight(
        torch.tensor([[0, 8, 15], [7, 9, 1]], dtype=torch.uint8), torch.tensor([[0.5], [2.0]]), None,
        parse_scheme("int4-channel-f32"),
    )  # fmt: skip
    arrays = stored_as(site, weight.scheme, "integers", Dialect()).arrays(weight)
    # -8 0 7 -1 1 -7, the first in the low half of the first byte.
    assert (arrays["codes"].type, arrays["codes"].shape) == ("INT4", (2, 1, 3))
    assert arrays["codes"].data == bytes([0x08, 0xF7, 0x91])
    assert arrays["scales"].shape == (2,)
    assert set(arrays) == {"codes", "scales"}


def test_blocks_lie_as_matmulnbits_wants_them() -> None:
    site = NetworkSite("l", "linear", "l.weight", (1, 18))
    codes = torch.arange(18, dtype=torch.uint8)[None] % 16
    zeros = torch.tensor([[3]], dtype=torch.int16)
    weight = QuantizedWeight(codes, torch.tensor([[0.5]]), zeros, parse_scheme("uint4-channel-asym-f32"))
    arrays = stored_as(site, weight.scheme, "blocks", Dialect()).arrays(weight)
    # The last block is filled up with zeros; both blocks have the zero point 3.
    row = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, 0x10, *[0] * 7]
    assert (arrays["codes"].type, arrays["codes"].shape) == ("UINT8", (1, 1, 16))
    assert arrays["codes"].data == bytes(row)
    assert arrays["zeros"].data == bytes([0x03])


def test_unsigned_codes_without_zero_points_say_so_where_none_means_the_middle() -> None:
    linear = NetworkSite("l", "linear", "l.weight", (1, 16))
    conv = NetworkSite("c", "conv", "c.weight", (1, 16, 1))
    assert stored_as(linear, parse_scheme("uint4-channel-f32"), "blocks", Dialect()).has_zeros
    assert not stored_as(linear, parse_scheme("int4-channel-f32"), "blocks", Dialect()).has_zeros
    assert not stored_as(conv, parse_scheme("uint4-channel-f32"), "decoded", Dialect()).has_zeros
    # 0 to 255 lie in INT8 as -128 to 127.
    assert stored_as(conv, parse_scheme("uint8-channel-f32"), "decoded", Dialect()).has_zeros


@pytest.mark.parametrize(
    ("scheme", "bytes_"),
    [
        ("int8-channel-f32", 4 * 144 + 4 * 4), ("int4-channel-f32", 4 * 72 + 4 * 4), ("int3-channel-f32", 4 * 72 + 16),
        ("int2-channel-f32", 4 * 36 + 4 * 4), ("int4-tensor-f32", 4 * 72 + 4), ("uint4-channel-asym-f32", 288 + 16 + 2),
        ("int4-g48-f32", 4 * 72 + 4 * 4 * 3),
    ],
)  # fmt: skip
def test_sizes_of_a_convolution_are_those_of_its_bits(scheme: str, bytes_: int) -> None:
    site = NetworkSite("c", "conv", "c.weight", (4, 16, 3, 3))
    assert size_bytes(parse_scheme(scheme), site) == bytes_


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ("nf4-g16-f32", "ONNX files hold integers, not nf4"),
        ("uint4-g16-offset-f32", "neither offsets nor scales that are codes"),
        ("int4-channel-f16", "scales are float32"),
        ("int4-g32-f32", "48 inputs cannot be split into groups of 32"),
        ("int4-g16-f32", None),
        ("int3-channel-f32", None),
        ("uint4-g16-fzero-f32", None),
    ],
)
def test_why_not_says_what_cannot_be_held(scheme: str, says: str | None) -> None:
    reason = why_not(parse_scheme(scheme), NetworkSite("l", "linear", "l.weight", (4, 48)), "onnxruntime")
    assert (reason is None) if says is None else (reason is not None and says in reason)


def test_why_not_looks_at_activations() -> None:
    assert why_not_activation(ActivationScheme()) is None
    assert why_not_activation(ActivationScheme(Int(4, signed=False))) is None
    assert "4 or 8 bits" in str(why_not_activation(ActivationScheme(Int(6, signed=False))))
    assert "uint8 with a zero point" in str(why_not_activation(ActivationScheme(Int(8), is_dynamic=True)))


@pytest.mark.parametrize(("kind", "scheme", "holds"), [
    ("linear", "int4-channel-f32", True), ("linear", "int4-g32-f32", False), ("conv", "int4-g32-f32", True),
])  # fmt: skip
def test_numbers_are_rounded_in_the_run_for_products_of_integers_alone(
    kind: NetworkSiteKind, scheme: str, holds: bool
) -> None:
    site = NetworkSite("l", kind, "l.weight", (4, 64, 1, 1) if kind == "conv" else (4, 64))
    activation = parse_network_scheme("w4a8-channel-dynamic").activation
    assert (why_not(parse_scheme(scheme), site, "onnxruntime", activation=activation) is None) == holds


def test_an_empty_weight_and_an_unknown_runtime_are_refused() -> None:
    empty = NetworkSite("l", "linear", "l.weight", (4, 0))
    assert "no elements" in str(why_not(parse_scheme("int4-channel-f32"), empty, "onnxruntime"))
    with pytest.raises(ValueError, match="use onnxruntime or openvino"):
        why_not(parse_scheme("int4-channel-f32"), empty, "tensorrt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accuracy level 2 does not exist"):
        Dialect(accuracy_level=2)
