"""Scales and offsets that are codes, searched together with the parents that they share."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from pennyweight.kernels.native import VARIABLE
from pennyweight.schemes import QuantizedWeight, fit_scales, parse_scheme
from pennyweight.schemes.fit import Fit
from pennyweight.schemes.nested import is_nested
from pennyweight.solvers.nearest import round_to_nearest

# GGUF's nested schemes, and the error of the search of scales and offsets group by group that took the parents from
# the largest of a span (the search of this project before it looked at parents), as a part of that of min-max.
FORMER = {
    "uint4-g32-offset-uint6x8.f16": 0.80,
    "uint5-g32-offset-uint6x8.f16": 0.84,
    "uint2-g16-offset-uint4x16.f16": 0.63,
    "int3-g16-int6x16.f16": 0.64,
    "int6-g16-int8x16.f16": 0.81,
    "nf4-g32-int6x8.f16": 0.75,
}
NAMES = [*FORMER, "uint4-g32-offset-f16", "uint5-g32-offset=uint6x8.f16-f16", "uint4-g32-offset=f16-uint6x8.f16"]
FITS: tuple[Fit, ...] = ("search", "minmax")


def weights(rows: int = 32, columns: int = 512, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def importance_of(columns: int) -> Tensor:
    return torch.exp(1.5 * torch.randn(columns, generator=torch.Generator().manual_seed(3)))


def fitted(w: Tensor, name: str, *, importance: Tensor | None = None, fit: Fit = "search") -> QuantizedWeight:
    scheme = parse_scheme(name)
    return round_to_nearest(w, scheme, fit_scales(w, scheme, importance=importance, fit=fit))


def error(w: Tensor, weight: QuantizedWeight, importance: Tensor | None = None) -> float:
    squares = (weight.dequantize().double() - w.double()).square()
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("name", FORMER)
def test_the_search_gains_on_minmax_what_searching_parents_adds(name: str) -> None:
    w = weights()
    search, minmax = (error(w, fitted(w, name, fit=fit)) for fit in FITS)
    assert search < FORMER[name] * minmax


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_no_span_is_worse_than_minmax(name: str, is_weighted: bool) -> None:
    w = weights(16)
    w[3] = w[3] ** 3 * 1e4
    importance = importance_of(512) if is_weighted else torch.ones(512)
    scheme = parse_scheme(name)
    span = scheme.group_size(512) * (scheme.scale.span or (scheme.offset.span if scheme.offset else None) or 1)

    def by_span(fit: Fit) -> Tensor:
        decoded = fitted(w, name, importance=importance, fit=fit).dequantize().double()
        return ((decoded - w.double()).square() * importance).reshape(16, -1, span).sum(-1)

    # Sums in float32 of up to 512 numbers.
    assert (by_span("search") <= by_span("minmax") * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", [name for name in FORMER if "offset" in name])
def test_importance_counts_between_the_groups_of_a_span(name: str) -> None:
    """One group matters: the parents are fitted to it, at the cost of the others."""
    w, importance = weights(), torch.full((512,), 1e-3)
    size = parse_scheme(name).group_size(512)
    importance[:size] = 1.0
    weighted, plain = (
        (fitted(w, name, importance=given).dequantize() - w)[:, :size].square().sum() for given in (importance, None)
    )
    assert weighted < 0.99 * plain


def test_offsets_of_one_sign_below_zero_get_a_parent_below_zero() -> None:
    """Weights from 1 to 2 need an offset of -1: sixteen steps for one unit, not for two."""
    w = 1 + torch.rand(8, 256, generator=torch.Generator().manual_seed(1))
    weight = fitted(w, "uint4-g32-offset-uint6x8.f16")
    assert weight.offset_parents is not None
    assert (weight.offset_parents < 0).all()
    # A step of 1/15 gives a variance of 1/2700; twice that step four times as much.
    assert (weight.dequantize() - w).square().mean() < 1.1 / (12 * 15**2)


@pytest.mark.parametrize("name", ["int3-g16-int6x16.f16", "int6-g16-int8x16.f16"])
def test_scales_of_a_span_may_differ_in_sign(name: str) -> None:
    """Groups whose larger extreme lies below and above zero by turns are held with all their codes."""
    element = parse_scheme(name).element
    values = torch.linspace(element.smallest, element.largest, 16).round()
    w = torch.cat([values, -values]).repeat(2, 8) * 2.0**-6
    weight = fitted(w, name)
    assert weight.parents is not None
    signs = weight.parameters.decoded(weight.scheme).scales.sign()
    assert torch.equal(signs[:, 0::2], -signs[:, 1::2])
    # Half a unit in the last place of a float16 parent.
    assert torch.allclose(weight.dequantize(), w, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_fitted_alike_in_any_company(name: str) -> None:
    w, importance = weights(33), importance_of(512)
    w[5], w[7], w[9] = w[5].abs() + 1, 0.0, 0.25
    whole = fitted(w, name, importance=importance)
    for part in (slice(0, 1), slice(5, 8), slice(9, 33)):
        alone = fitted(w[part], name, importance=importance)
        for mine, theirs in zip(astuple(alone.parameters), astuple(whole.rows(part).parameters), strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_fitted_like_their_float32(name: str, dtype: torch.dtype) -> None:
    w = weights().to(dtype)
    assert torch.equal(fitted(w, name).dequantize(), fitted(w.float(), name).dequantize())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("size", [1e-38, 1e-9, 1e4, 1e18, 3e38])
def test_any_finite_weight_decodes_finitely(
    monkeypatch: pytest.MonkeyPatch, name: str, choice: str, size: float
) -> None:
    monkeypatch.setenv(VARIABLE, choice)
    w = weights(4).clamp(-1, 1) * size
    w[1], w[2, :200], w[3, 7] = 0.0, size, -size
    weight = fitted(w, name)
    decoded = weight.parameters.decoded(weight.scheme)
    assert weight.dequantize().isfinite().all()
    assert (decoded.scales != 0).all()
    assert (weight.dequantize()[1] == 0).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("uint4-g32-offset-uint6x8.f16", True), ("int3-g16-int6x16.f16", True), ("uint4-channel-offset-f16", True),
     ("int4-g32-f16", False), ("nvfp4", False), ("int4-g32-asym-f16", False), ("int4-tensor-offset-f16", False),
     ("bal2-g16-offset=f16-fp8_e5m2.bf16", False), ("uint4-g32-offset=uint4x8.f16-uint6x4.f16", False)],
)  # fmt: skip
def test_the_search_takes_what_it_can_decide_span_by_span(name: str, expected: bool) -> None:
    assert is_nested(parse_scheme(name)) == expected
