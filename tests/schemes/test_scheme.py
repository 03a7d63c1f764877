"""Schemes: their names, shapes and exact sizes, and the weights that they decode to."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.errors import ShapeError, UsageError
from pennyweight.core.registry import provided
from pennyweight.formats import NumberFormat
from pennyweight.formats.integer import Int
from pennyweight.schemes import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizedWeight,
    ScaleSpec,
    Scheme,
    ZeroSpec,
    parse_scheme,
)
from pennyweight.schemes.fit import Fit, fit_scales
from pennyweight.schemes.scheme import WORDS
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.nearest import Nearest

GRANULARITIES: st.SearchStrategy[Granularity] = st.one_of(
    st.just(PerTensor()), st.just(PerChannel()), st.builds(PerGroup, st.integers(1, 10**9 - 1))
)
ELEMENTS = [element for element in provided("formats").values() if element.smallest <= 0]
FLOATS = st.builds(ScaleSpec, st.sampled_from(["model", "float16", "bfloat16", "float32"]))
CODES = st.sampled_from(["uint6", "int8", "fp8_e4m3"])
SPECS = st.one_of(
    FLOATS,
    st.just(ScaleSpec("e8m0")),
    st.builds(ScaleSpec, CODES, FLOATS),
    st.builds(ScaleSpec, CODES, FLOATS, st.integers(1, 4)),
)
FLOAT_ZEROS = st.builds(ZeroSpec, st.sampled_from(["model", "float16", "bfloat16", "float32"]))


COMPUTED = st.sampled_from([None, "float16", "bfloat16", "float32"])


def schemes(elements: list[NumberFormat], **choices: st.SearchStrategy[object]) -> st.SearchStrategy[Scheme]:
    element = st.sampled_from(elements)
    return st.builds(Scheme, element=element, granularity=GRANULARITIES, scale=SPECS, computed=COMPUTED, **choices)


SCHEMES = st.one_of(
    schemes(ELEMENTS),
    schemes([element for element in ELEMENTS if isinstance(element, Int)], zero=st.just(ZeroSpec())),
    schemes(ELEMENTS, zero=FLOAT_ZEROS),
    schemes(ELEMENTS, offset=SPECS),
)
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def quantized(w: Tensor, name: str) -> QuantizedWeight:
    return Nearest().solve(w, parse_scheme(name), Statistics()).weight


@given(scheme=SCHEMES)
def test_a_name_reads_back_as_the_scheme_that_printed_it(scheme: Scheme) -> None:
    assert parse_scheme(scheme.name) == scheme
    assert str(scheme) == scheme.name


@pytest.mark.parametrize(
    "name", ["int4-g128", "int4-g32-asym", "int8-channel", "int8-tensor-f32", "uint3-g64-asym-bf16", "int2-channel-f16",
     "nf4-g64", "mxfp4", "mxfp8", "nvfp4", "fp8_e4m3-channel", "ternary-g64", "bal2-g64", "int4-g64-offset",
     "int4-g64-offset-f16", "int4-g32-fzero", "int4-g32-fzero=f32-f16", "uint4-g32-offset-uint6x8.f32",
     "int6-g16-int8x16.f32", *WORDS, "int4-g64-f16-f32", "int4-channel-model-f32", "nf4-g64-offset-f16-bf16",
     "int6-g16-int8x16.f16-f16", "uint2-g16-offset=uint4x16.f32-uint4x16.f16", "fp4_e2m1-g16-fp8_e4m3.bf16",
     "int4-g32-fzero=model-bf16", "uint4-g32-offset-uint6x8.model"]
)  # fmt: skip
def test_names_print_as_they_were_read(name: str) -> None:
    assert parse_scheme(name).name == name


@pytest.mark.parametrize(
    "name",
    ["", "int4", "int4-", "int4-g0", "int4-g", "int4-g-1", "int4-g032", "int4-row",
     "INT4-g128",     "int4-g128-sym", " int4-g128",
     "int4-g128-f64", "int4-g128-f16-asym", "int4-g128-asym-asym", "int4-g1e3", "int4-g128\n", "int4-g9999999999",
     "int4-g32-float9", "int4-g32-f16.f16", "int4-g32-uint6x8", "int4-g32-uint6x0.f16", "int4-g32-offset-asym",
     "int4-g32-fzero=e8m0", "int4-g32-offset=x", "int4-g32-uint6.uint6", "int4-g32-f16-e8m0",
     "int4-g32-f16-model", "int4-g32-f16-f32-f32", "Q4_0", "q4_k_m"],
)  # fmt: skip
def test_a_name_that_means_nothing_is_answered_with_how_to_write_one(name: str) -> None:
    with pytest.raises(UsageError, match="is not the name of a scheme: write FORMAT-SHARED.*int4-g32-asym"):
        parse_scheme(name)


@given(text=st.text(max_size=20))
def test_any_other_text_is_a_usage_error(text: str) -> None:
    try:
        scheme = parse_scheme(text)
    except UsageError:
        return
    assert parse_scheme(scheme.name) == scheme


@pytest.mark.parametrize("name", ["int9-g128", "nf5-channel", "int1-tensor"])
def test_an_unknown_number_format_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(UsageError, match="is not one of the formats: .*int2, int3, int4"):
        parse_scheme(name)


def test_a_group_holds_at_least_one_weight() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        PerGroup(0)


def test_groups_must_divide_the_inputs() -> None:
    scheme = parse_scheme("int4-g128-f16")
    assert scheme.scale_shape((3, 384)) == (3, 3)
    for use in (scheme.scale_shape, scheme.storage_bits):
        with pytest.raises(
            ShapeError, match="172 inputs cannot be split into groups of 128: use a group size that divides"
        ):
            use((3, 172))
    with pytest.raises(ShapeError, match="172 inputs"):
        quantized(torch.randn(3, 172), "int4-g128-f16")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_only_matrices_have_schemes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="give a matrix"):
        parse_scheme("int4-channel-f16").scale_shape(shape)


def test_scales_of_the_models_type_are_fixed_once() -> None:
    scheme = parse_scheme("int4-g32")
    assert scheme.with_scale_dtype(torch.bfloat16) == parse_scheme("int4-g32-bf16")
    assert parse_scheme("int4-g32-f32").with_scale_dtype(torch.bfloat16).scale.torch_dtype == torch.float32
    with pytest.raises(UsageError, match="with_scale_dtype first"):
        scheme.storage_bits((2, 32))
    with pytest.raises(UsageError, match=r"not as torch\.float64"):
        scheme.with_scale_dtype(torch.float64)


def test_the_type_in_which_a_reader_computes_is_said_only_where_it_is_not_the_usual_one() -> None:
    assert parse_scheme("int4-g32-f16-f16").name == "int4-g32-f16"
    assert parse_scheme("uint4-g32-offset-f16-f32") == parse_scheme("q4_1")
    assert parse_scheme("int4-g32-model-f32").with_scale_dtype(torch.float32) == parse_scheme("int4-g32-f32")
    assert parse_scheme("int4-g32-model-f32").with_scale_dtype(torch.float16) == parse_scheme("q4_0")
    assert parse_scheme("int4-g32-f16").arithmetic == torch.float16
    assert parse_scheme("int4-g32-f16-bf16").arithmetic == torch.bfloat16
    with pytest.raises(UsageError, match=r"not computed in float64: use float16, bfloat16, float32"):
        Scheme(Int(4), PerChannel(), computed="float64")


def test_a_weight_is_computed_in_the_type_that_its_scheme_names() -> None:
    weight = quantized(torch.randn(6, 96), "int8-g32-f16")
    other = QuantizedWeight(weight.codes, weight.scales, None, parse_scheme("int8-g32-f16-f32"))
    values = (weight.codes.double() - 128).reshape(6, 3, 32)
    exact = (values * weight.scales.double()[..., None]).reshape(6, 96)
    assert torch.equal(other.dequantize(), exact.float())
    assert torch.equal(weight.dequantize(), exact.half().float())
    assert not torch.equal(weight.dequantize(), other.dequantize())


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "iq4_nl", "q8_0", "int4-g32-fzero=f32-f16"])
@pytest.mark.parametrize("fit", ["minmax", "search"])
def test_scales_of_huge_weights_stay_within_their_type_whatever_a_reader_computes_in(name: str, fit: Fit) -> None:
    found = fit_scales(torch.randn(4, 64) * 1e8, parse_scheme(name), fit=fit)
    assert found.scales.isfinite().all()


def in_bits(tensor: Tensor, spec: ScaleSpec) -> int:
    """Bits that the numbers of `tensor` take: floats their own, codes those of their format."""
    return tensor.numel() * (8 * tensor.itemsize if spec.element is None else spec.element.bits)


@settings(max_examples=150, deadline=None)
@given(
    scheme=SCHEMES.map(lambda scheme: scheme.with_scale_dtype(torch.float16)),
    rows=st.integers(0, 5),
    groups=st.integers(0, 4),
    size=st.integers(1, 9),
)
def test_storage_is_what_counting_says(scheme: Scheme, rows: int, groups: int, size: int) -> None:
    if isinstance(scheme.granularity, PerGroup):
        scheme = scheme.with_granularity(PerGroup(size))
    spans = (spec.span or 1 for spec in (scheme.scale, scheme.offset) if spec is not None)
    assume(all(scheme.scale_shape((rows, groups * size))[1] % span == 0 for span in spans))
    weight = Nearest().solve(torch.randn(rows, groups * size), scheme, Statistics()).weight
    counted = weight.codes.numel() * scheme.element.bits + in_bits(weight.scales, scheme.scale)
    counted += 0 if weight.parents is None else in_bits(weight.parents, ScaleSpec("float32"))
    counted += 0 if weight.offset_parents is None else in_bits(weight.offset_parents, ScaleSpec("float32"))
    if weight.offsets is not None and scheme.offset is not None:
        counted += in_bits(weight.offsets, scheme.offset)
    if weight.zeros is not None:
        integer = scheme.element.bits if scheme.has_integer_zero else 8 * weight.zeros.itemsize
        counted += weight.zeros.numel() * integer
    assert scheme.storage_bits((rows, groups * size)) == counted


def by_compressed_tensors(weight: QuantizedWeight) -> Tensor:
    """The weight as compressed-tensors decodes it."""
    granularity, element = weight.scheme.granularity, weight.scheme.element
    names = {PerTensor: "tensor", PerChannel: "channel", PerGroup: "group"}
    args = QuantizationArgs(
        num_bits=element.bits,
        symmetric=weight.zeros is None,
        strategy=names[type(granularity)],
        group_size=granularity.size if isinstance(granularity, PerGroup) else None,
    )
    values = (weight.codes.to(torch.int16) - 2 ** (element.bits - 1)).to(torch.int8)
    zeros = None if weight.zeros is None else weight.zeros.to(torch.int8)
    scales = weight.scales
    if isinstance(granularity, PerTensor):
        scales, zeros = scales[0], None if zeros is None else zeros[0]
    return dequantize(values, scales, zeros, args)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shared", ["tensor", "channel", "g32"])
@pytest.mark.parametrize("asym", ["", "-asym"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_decoding_is_that_of_compressed_tensors_bit_for_bit(bits: int, shared: str, asym: str, kind: str) -> None:
    weight = quantized(torch.randn(6, 96) * 0.03 + 0.01, f"int{bits}-{shared}{asym}-{kind}")
    assert weight.scales.dtype == DTYPES[kind]
    for dtype in DTYPES.values():
        assert torch.equal(weight.dequantize(dtype), by_compressed_tensors(weight).to(dtype))


def test_every_code_decodes_like_compressed_tensors_also_those_that_no_solver_emits() -> None:
    scheme = parse_scheme("int8-channel-asym-bf16")
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    scales = torch.tensor([[0.013], [-0.5], [0.0], [3e-3]], dtype=torch.bfloat16)
    zeros = torch.tensor([[-128], [127], [3], [-1]], dtype=torch.int16)
    weight = QuantizedWeight(codes, scales, zeros, scheme)
    assert torch.equal(weight.dequantize(torch.bfloat16), by_compressed_tensors(weight))


def test_decoding_edits_nothing() -> None:
    weight = quantized(torch.randn(4, 64), "int4-g32-asym-f32")
    assert weight.zeros is not None
    before = (weight.codes.clone(), weight.scales.clone(), weight.zeros.clone())
    assert torch.equal(weight.dequantize(), weight.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(before, (weight.codes, weight.scales, weight.zeros), strict=True))


def test_scales_or_zeros_that_do_not_fit_are_refused() -> None:
    good = quantized(torch.randn(4, 64), "int4-g32-asym-f16")
    with pytest.raises(ShapeError, match=r"scales \(4, 2\) torch.float32, expected \(4, 2\) torch.float16"):
        QuantizedWeight(good.codes, good.scales.float(), good.zeros, good.scheme)
    with pytest.raises(ShapeError, match=r"scales \(4, 1\)"):
        QuantizedWeight(good.codes, good.scales[:, :1], good.zeros, good.scheme)
    with pytest.raises(ShapeError, match=r"zero points must be \(4, 2\)"):
        QuantizedWeight(good.codes, good.scales, None, good.scheme)
    with pytest.raises(ShapeError, match="zero points must be absent"):
        QuantizedWeight(good.codes, good.scales, good.zeros, parse_scheme("int4-g32-f16"))
