"""Fitting of scales and zero points: never worse than min-max on its own objective, exact where it can be."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pennyweight.core.errors import ShapeError
from pennyweight.schemes import Parameters, QuantizedWeight, Scheme, fit_scales, parse_scheme
from pennyweight.schemes.fit import Fit
from pennyweight.schemes.quantized import grouped
from pennyweight.solvers.nearest import round_to_nearest

# The search compares float32 sums over a group of at most a few thousand weights: their relative rounding error.
SUM_ERROR = 1e-5
FITS: tuple[Fit, ...] = ("search", "minmax")
NAMES = [
    f"{element}-{shared}{asym}-{kind}"
    for element, shared, kind in [
        ("int2", "g8", "f16"),
        ("int3", "channel", "bf16"),
        ("int4", "tensor", "f32"),
        ("int8", "g16", "bf16"),
        ("uint4", "g8", "f16"),
    ]
    for asym in ("", "-asym")
]  # fmt: skip


def fitted(w: Tensor, name: str, *, importance: Tensor | None = None, fit: Fit = "search") -> QuantizedWeight:
    scheme = parse_scheme(name)
    return round_to_nearest(w, scheme, fit_scales(w, scheme, importance=importance, fit=fit))


def group_errors(w: Tensor, weight: QuantizedWeight, importance: Tensor | None = None) -> Tensor:
    """sum_i importance_i * (w_i - scale * (value_i - zero))**2 of each group in float64, the product not rounded."""
    scheme = weight.scheme
    values = grouped(scheme.element.decode(weight.codes).double(), scheme)
    zeros = 0 if weight.zeros is None else weight.zeros.double()[..., None]
    error = grouped(w.double(), scheme) - weight.scales.double()[..., None] * (values - zeros)
    columns = torch.ones(w.shape[1], dtype=torch.float64) if importance is None else importance.double()
    return (error.square() * grouped(columns.expand(w.shape), scheme)).sum(-1)


def cauchy(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(rows, cols).cauchy_(generator=generator) * 0.02


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    groups=st.integers(1, 3),
    exponent=st.integers(-12, 12),
    is_heavy_tailed=st.booleans(),
    is_weighted=st.booleans(),
)
def test_the_search_is_never_worse_than_minmax_on_its_own_objective(
    name: str, seed: int, rows: int, groups: int, exponent: int, is_heavy_tailed: bool, is_weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = cauchy(rows, 16 * groups, seed) if is_heavy_tailed else torch.randn(rows, 16 * groups, generator=generator)
    w = w * 2.0**exponent
    importance = torch.rand(16 * groups, generator=generator) + 0.01 if is_weighted else None
    search, minmax = (group_errors(w, fitted(w, name, importance=importance, fit=fit), importance) for fit in FITS)
    assert (search <= minmax * (1 + SUM_ERROR)).all()


@pytest.mark.parametrize(
    "name", ["int4-g128-bf16", "int3-g128-bf16", "int2-g32-f16", "int4-g128-asym-bf16", "int2-g32-asym-f16"]
)
def test_the_search_gains_what_low_widths_can_gain(name: str) -> None:
    w = torch.randn(64, 512) * 0.02
    search, minmax = (group_errors(w, fitted(w, name, fit=fit)).sum() for fit in FITS)
    # Seen: 0.56 (2 bits) to 0.93 (4 bits asymmetric).
    assert search < 0.95 * minmax


def test_the_search_comes_close_to_trying_every_scale() -> None:
    w = torch.randn(32, 64)
    scheme = parse_scheme("int3-g32-f32")
    found = group_errors(w, fitted(w, scheme.name))
    best = torch.full_like(found, float("inf"))
    for factor in torch.cat([torch.linspace(-0.8, -0.1, 300), torch.linspace(0.1, 0.8, 300)]):
        scales = grouped(w, scheme).abs().amax(-1) * factor
        best = torch.minimum(best, group_errors(w, round_to_nearest(w, scheme, Parameters(scales))))
    # The grid has steps of 4 % of the range, and takes one sign only.
    assert found.sum() < 1.03 * best.sum()


@pytest.mark.parametrize("name", ["int3-g32-bf16", "int3-g32-asym-bf16", "int3-tensor-bf16", "int3-channel-bf16"])
def test_a_column_of_importance_is_fitted_better(name: str) -> None:
    w = torch.randn(64, 64)
    importance = torch.ones(64)
    importance[[5, 40]] = 1e4
    weighted = (w - fitted(w, name, importance=importance).dequantize())[:, [5, 40]].square().mean()
    plain = (w - fitted(w, name).dequantize())[:, [5, 40]].square().mean()
    assert weighted < (0.95 if "tensor" in name else 0.25) * plain


def test_one_huge_importance_does_not_level_the_others() -> None:
    w = torch.randn(64, 64)
    importance = torch.ones(64)
    importance[40] = 1e4
    expected = fitted(w, "int3-g32-f32", importance=importance)
    importance[5] = 1e12
    found = fitted(w, "int3-g32-f32", importance=importance)
    assert torch.equal(found.scales[:, 1], expected.scales[:, 1])


def test_the_size_of_importance_does_not_matter() -> None:
    w, importance = torch.randn(16, 64), torch.rand(64) + 0.01
    expected = fitted(w, "int3-g32-asym-f16", importance=importance)
    for factor in (2.0**-100, 2.0**100):
        found = fitted(w, "int3-g32-asym-f16", importance=importance * factor)
        assert torch.equal(found.scales, expected.scales)
        assert torch.equal(found.codes, expected.codes)


def test_importance_of_nothing_is_importance_of_all() -> None:
    w = torch.randn(16, 64)
    expected = fitted(w, "int3-g32-f16")
    for importance in (torch.zeros(64), torch.ones(64)):
        assert torch.equal(fitted(w, "int3-g32-f16", importance=importance).scales, expected.scales)


@pytest.mark.parametrize("length", [1, 32, 128])
def test_importance_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ShapeError, match="for 64 columns"):
        fit_scales(torch.randn(2, 64), parse_scheme("int4-g32-f16"), importance=torch.ones(length))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fit", FITS)
def test_the_number_of_threads_changes_no_bit(name: str, fit: Fit) -> None:
    w, importance = torch.randn(300, 512), torch.rand(512)
    before = torch.get_num_threads()
    found: list[QuantizedWeight] = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fitted(w, name, importance=importance, fit=fit))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].scales, found[1].scales)
    assert torch.equal(found[0].codes, found[1].codes)
    assert found[0].zeros is None or torch.equal(found[0].zeros, found[1].zeros)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_narrow_weights_are_fitted_like_their_copies(name: str) -> None:
    w = torch.randn(48, 32).half()
    for strided, same in ((w.T, w.T.contiguous().float()), (w[::3, ::2], w[::3, ::2].float().clone()), (w, w.float())):
        found, expected = fitted(strided, name), fitted(same, name)
        assert torch.equal(found.scales, expected.scales)
        assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fit", FITS)
def test_no_argument_is_edited(name: str, fit: Fit) -> None:
    w, importance = torch.randn(4, 32), torch.rand(32)
    kept, kept_importance = w.clone(), importance.clone()
    fitted(w, name, importance=importance, fit=fit)
    assert torch.equal(w, kept)
    assert torch.equal(importance, kept_importance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (0, 0)])
def test_empty_weights_are_fitted(name: str, shape: tuple[int, int]) -> None:
    weight = fitted(torch.empty(shape), name, importance=torch.ones(shape[1]))
    assert weight.shape == shape
    assert weight.dequantize().shape == shape


# Numbers that each stored type holds exactly.
CONSTANTS = [0.0, 1.0, -1.0, 0.375, -0.0625, 448.0, -3072.0, 2.0**-13]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fit", FITS)
def test_a_group_of_one_value_decodes_to_it(name: str, fit: Fit) -> None:
    for constant in CONSTANTS:
        w = torch.full((3, 32), constant)
        assert torch.equal(fitted(w, name, fit=fit).dequantize(), w)


@pytest.mark.parametrize("fit", FITS)
def test_groups_of_one_weight_decode_to_the_nearest_of_the_stored_type(fit: Fit) -> None:
    w = cauchy(20, 30, seed=1)
    for asym in ("", "-asym"):
        for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)):
            assert torch.equal(fitted(w, f"int4-g1{asym}-{kind}", fit=fit).dequantize(), w.to(dtype).float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-9, 1e-5, 6e4, 1e6, 3.4e38])
def test_any_finite_weight_decodes_finitely_and_within_its_range(name: str, fit: Fit, size: float) -> None:
    w = torch.randn(8, 32).clamp(-1, 1) * size
    weight = fitted(w.abs() if name.startswith("uint") and "asym" not in name else w, name, fit=fit)
    decoded = weight.dequantize()
    assert weight.scales.isfinite().all()
    assert (weight.scales != 0).all()
    assert decoded.isfinite().all()
    assert (decoded.abs() <= 1.5 * w.abs().max()).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fit", FITS)
def test_a_constant_beyond_the_stored_type_decodes_to_what_that_can_hold(name: str, fit: Fit) -> None:
    for constant in (1e5, -1e5, 3e38, -3e38, 65504.0, 5000.0):
        decoded = fitted(torch.full((2, 32), constant), name, fit=fit).dequantize()
        assert decoded.isfinite().all()
        assert (decoded.sign() == (1 if constant > 0 else -1)).all()
        held = min(abs(constant), 65504.0 if name.endswith("-f16") else abs(constant))
        # A quarter: the largest scale keeps 2**bits times itself finite, and int2 reaches +1 only.
        assert (decoded.abs() >= held / 4).all()


@pytest.mark.parametrize(
    "name", ["int4-g8-f16", "int2-g8-f16", "uint4-g8-f16", "int4-g8-asym-f16", "uint4-g8-asym-f16"]
)
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_groups_of_one_sign_keep_their_sign(name: str, fit: Fit, sign: int) -> None:
    w = sign * (torch.rand(16, 64) + 0.5)
    decoded = fitted(w, name, fit=fit).dequantize()
    # Half a step of 2 bits on one side of zero is a third of the largest weight (1.5) at most.
    assert ((w - decoded).abs() <= 0.76).all()
    assert (decoded * sign >= 0).all()


@pytest.mark.parametrize("element", ["int2", "int4", "int8", "uint4", "uint8"])
@pytest.mark.parametrize("fit", FITS)
def test_zero_points_are_values_of_the_format_and_give_an_exact_zero(element: str, fit: Fit) -> None:
    w = torch.cat([torch.randn(8, 32), torch.rand(8, 32) + 3, -torch.rand(8, 32) - 3, cauchy(8, 32, 3)])
    w[:, ::7] = 0
    weight = fitted(w, f"{element}-g16-asym-f16", fit=fit)
    assert weight.zeros is not None
    assert weight.zeros.dtype == torch.int16
    assert (weight.zeros >= weight.scheme.element.smallest).all()
    assert (weight.zeros <= weight.scheme.element.largest).all()
    assert (weight.dequantize()[:, ::7] == 0).all()


def reaches_both_ends(w: Tensor, weight: QuantizedWeight) -> bool:
    """Whether no weight is further than half a step (and the rounding of scale and zero point) from its decoding."""
    step = weight.scales.float().abs()[..., None]
    off = (grouped(w, weight.scheme) - grouped(weight.dequantize(), weight.scheme)).abs()
    half = 0.5 if weight.zeros is None else 1.0
    return bool((off <= step * (half + 0.02 * 2**weight.scheme.element.bits / 16)).all())


@pytest.mark.parametrize(
    "name", ["int3-g8-f16", "int4-g16-f16", "int4-tensor-f32", "int3-g8-asym-f16", "uint4-g8-asym-f16"]
)
def test_minmax_reaches_both_ends(name: str) -> None:
    for w in (torch.randn(9, 32), cauchy(9, 32, 4), torch.rand(9, 32), -torch.rand(9, 32)):
        assert reaches_both_ends(w, fitted(w, name, fit="minmax"))


def test_minmax_takes_the_smallest_scale_that_holds_every_weight() -> None:
    w = torch.tensor([[-8.0, 3.0], [2.0, 7.0], [-4.0, 7.0], [-16.0, 7.0]])
    scales = fit_scales(w, parse_scheme("int4-g2-f32"), fit="minmax").scales
    assert scales.flatten().tolist() == [1.0, 1.0, 1.0, 2.0]


def test_scales_are_rounded_before_codes_are_chosen() -> None:
    """Codes chosen with the exact scale 1.001 would be worse: bfloat16 stores 1.0."""
    scheme: Scheme = parse_scheme("int8-g2-bf16")
    w = torch.tensor([[-1.001 * 128, 100.3 * 1.001]])
    weight = fitted(w, scheme.name, fit="minmax")
    assert weight.scales.item() == 1.0
    assert weight.dequantize()[0, 1].item() == 100.0


@pytest.mark.slow
def test_a_large_weight_is_searched_in_under_a_second() -> None:
    w, importance = torch.randn(4096, 4096) * 0.02, torch.rand(4096)
    scheme = parse_scheme("int4-g128-bf16")
    fit_scales(w[:64], scheme, importance=importance)
    times_s = []
    # The best of several: other work on the machine only ever adds time.
    for _ in range(5):
        start = time.perf_counter()
        fit_scales(w, scheme, importance=importance)
        times_s.append(time.perf_counter() - start)
    assert min(times_s) < 1.0
