"""Another scheme holds the same numbers, or says why it cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.formats.integer import Int
from pennyweight.schemes import Parameters, QuantizedWeight, Scheme, parse_scheme, reexpressed

SOURCES = ["int2-g32-bf16", "int3-channel-f16", "int4-g128-bf16", "int4-g64-f32", "int4-tensor-f16", "q4_k", "q6_k",
           "int4-g32-asym-bf16", "int3-g64-asym-f16", "int8-g128-bf16", "int8-g32-asym-f16", "uint4-g32-offset-f16",
           "mxfp4", "mxfp8", "nvfp4", "q3_k", "iq4_xs", "iq4_nl", "mxfp4_ggml", "nf4-g32-f16",
           "int4-g32-fzero-f16"]  # fmt: skip
TARGETS = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "mxfp4_ggml", "tq2_0", "q4_k", "int2-g32-bf16",
           "int4-g32-f32", "int4-g32-asym-f32", "int5-g16-f32", "int6-g16-f32", "int8-g32-f32", "int8-channel-bf16",
           "int8-tensor-f32", "int4-g256-f16", "uint8-g32-offset-f32", "int4-g32-fzero-f32"]  # fmt: skip


def _weight(scheme: Scheme, shape: tuple[int, int], seed: int, *, alike: bool = False) -> QuantizedWeight:
    """Any codes and parameters; `alike`: all scales of a row are one number."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.scale_shape(shape)

    def drawn(count: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if dtype == torch.uint8:
            found = torch.randint(100, 140, count, generator=generator) % 2**scheme.scale.bits
            found = found.to(torch.uint8)
        else:
            found = torch.randn(count, generator=generator).mul(0.05).to(dtype)
            found[torch.rand(count, generator=generator) < 0.1] = 0
        return found[:, :1].expand(count).contiguous() if alike and count[1] else found

    low, high = int(scheme.element.smallest), int(scheme.element.largest)
    zeros = offsets = parents = offset_parents = None
    if scheme.has_integer_zero:
        zeros = torch.randint(low, high + 1, groups, generator=generator).to(torch.int16)
    elif scheme.zero is not None:
        zeros = torch.randint(low, high + 1, groups, generator=generator).to(scheme.zero.torch_dtype)
    if scheme.offset is not None:
        offsets = torch.randint(0, 60, groups, generator=generator).to(scheme.offset.torch_dtype)
        if scheme.offset.parent is not None:
            offset_parents = torch.rand(scheme.offset.parent_shape(groups), generator=generator).half()
    if scheme.scale.parent is not None:
        kind = scheme.scale.parent.torch_dtype
        parents = torch.rand(scheme.scale.parent_shape(groups), generator=generator).to(kind)
    scales = drawn(groups, scheme.scale.torch_dtype)
    codes = torch.randint(0, 2**scheme.element.bits, shape, generator=generator).to(torch.uint8)
    return QuantizedWeight.of(codes, Parameters(scales, zeros, offsets, parents, offset_parents), scheme)


def _numbers(weight: QuantizedWeight) -> Tensor:
    """scale * (value - zero) or scale * value - offset as real numbers, written out: float64 holds all of them."""
    found = weight.parameters.decoded(weight.scheme)

    def spread(x: Tensor | None) -> Tensor | float:
        if x is None:
            return 0.0
        rows, columns = weight.shape
        return x.double().expand(rows, -1).repeat_interleave(columns // x.shape[1], dim=1)

    values = weight.scheme.element.decode(weight.codes).double()
    return spread(found.scales) * (values - spread(found.zeros)) - spread(found.offsets)


@settings(max_examples=400, deadline=None)
@given(
    source=st.sampled_from(SOURCES), target=st.sampled_from(TARGETS), rows=st.integers(1, 5),
    blocks=st.integers(1, 2), seed=st.integers(0, 10**6), alike=st.booleans(),
)  # fmt: skip
def test_what_comes_out_is_the_same_number_for_number(
    source: str, target: str, rows: int, blocks: int, seed: int, alike: bool
) -> None:
    weight = _weight(parse_scheme(source), (rows, 256 * blocks), seed, alike=alike)
    found = reexpressed(weight, parse_scheme(target))
    if isinstance(found, str):
        assert len(found) > 20
        return
    assert found.scheme == parse_scheme(target)
    assert torch.equal(_numbers(found), _numbers(weight))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("int4-g128-bf16", "q4_0"), ("int4-g64-f16", "q4_0"), ("int4-channel-f16", "q4_0"), ("int4-tensor-f16", "q4_0"),
        ("int2-g32-bf16", "q4_0"), ("int3-g128-bf16", "q4_0"), ("int5-g128-bf16", "q5_0"), ("int6-g64-f16", "q8_0"),
        ("int8-g128-bf16", "q8_0"), ("int4-g32-asym-bf16", "q5_0"), ("int3-g64-asym-f16", "q4_0"),
        ("mxfp4", "mxfp4_ggml"), ("mxfp4_ggml", "mxfp4"), ("q4_0", "int4-g32-f32"), ("q4_0", "int4-g32-f16"),
        ("q5_0", "int5-g32-f32"), ("q8_0", "int8-g32-f32"), ("q6_k", "int6-g16-f32"), ("q3_k", "int3-g16-f32"),
        ("iq4_nl", "int8-g32-f32"), ("iq4_xs", "int8-g32-f32"), ("int4-g32-asym-bf16", "uint4-g32-offset-f32"),
        ("int4-g32-fzero-f16", "int5-g32-f32"), ("uint4-g32-f16", "q5_0"), ("int4-g32-bf16", "int6-g32-asym-f32"),
    ],
)  # fmt: skip
def test_these_always_fit(source: str, target: str) -> None:
    for seed in range(5):
        weight = _weight(parse_scheme(source), (3, 512), seed)
        found = reexpressed(weight, parse_scheme(target))
        assert isinstance(found, QuantizedWeight), found
        assert torch.equal(_numbers(found), _numbers(weight))


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("int4-g128-f32", "q4_0", "scales are no float16 numbers"),
        ("int4-g16-f16", "q4_0", "would stand for several that differ"),
        ("int8-g32-f16", "q4_0", "some of its values are no numbers of int4"),
        ("int8-g32-asym-f16", "q8_0", "less its zero points or offsets are no numbers of int8"),
        ("int4-g128-bf16", "q4_k", "found by rounding only"),
        ("q4_k", "int8-g32-f32", "less its zero points or offsets"),
        ("nf4-g32-f16", "q8_0", "values are no numbers of int8"),
        ("nvfp4", "mxfp4", "would stand for several that differ"),
        ("int4-g32-bf16", "int4-g32-fzero-f32", "found by rounding only"),
        ("int4-g96-bf16", "int4-g128-bf16", "cannot be split into groups of 128"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_why(source: str, target: str, reason: str) -> None:
    found = reexpressed(_weight(parse_scheme(source), (3, 192 if "96" in source else 256), 1), parse_scheme(target))
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("scale", [65536.0, 2.0**-25, 1 + 2.0**-12, float("inf"), float("nan")])
def test_a_single_scale_that_float16_lacks_is_found(scale: float) -> None:
    weight = _weight(parse_scheme("int4-g64-f32"), (4, 256), 0)
    fitting = QuantizedWeight(weight.codes, weight.scales.half().float(), None, weight.scheme)
    assert isinstance(reexpressed(fitting, parse_scheme("q4_0")), QuantizedWeight)
    fitting.scales[2, 3] = scale
    assert isinstance(reexpressed(fitting, parse_scheme("q4_0")), str)


def test_the_nan_among_the_scales_of_mxfp4_is_no_number() -> None:
    weight = _weight(parse_scheme("mxfp4"), (2, 64), 0)
    weight.scales[1, 1] = 255
    assert isinstance(reexpressed(weight, parse_scheme("mxfp4_ggml")), str)


def test_equal_scales_of_small_groups_become_one() -> None:
    weight = _weight(parse_scheme("int4-g16-bf16"), (3, 256), 0, alike=True)
    for target in ("q4_0", "int4-channel-bf16"):
        found = reexpressed(weight, parse_scheme(target))
        assert isinstance(found, QuantizedWeight)
        assert torch.equal(_numbers(found), _numbers(weight))


def test_the_smallest_and_the_largest_codes_survive() -> None:
    for bits, target in ((2, "q4_0"), (4, "q4_0"), (5, "q5_0"), (8, "q8_0")):
        scheme = Scheme(Int(bits), parse_scheme("int4-g32").granularity).with_scale_dtype(torch.float16)
        codes = torch.tensor([0, 2**bits - 1], dtype=torch.uint8).repeat(2, 16)
        found = reexpressed(QuantizedWeight(codes, torch.ones(2, 1).half(), None, scheme), parse_scheme(target))
        assert isinstance(found, QuantizedWeight)
        assert found.dequantize().unique().tolist() == [-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1]


def test_the_same_scheme_is_the_same_weight_and_nothing_stays_nothing() -> None:
    weight = _weight(parse_scheme("q4_k"), (2, 256), 0)
    assert reexpressed(weight, parse_scheme("q4_k")) is weight
    empty = _weight(parse_scheme("int4-g32-f16"), (0, 256), 0)
    found = reexpressed(empty, parse_scheme("q4_0"))
    assert isinstance(found, QuantizedWeight)
    assert found.shape == (0, 256)
