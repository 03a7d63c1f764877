"""HQQ against the paper's loop in float64, and against the grids from which it starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.schemes import Parameters, Scheme, fit_scales, parse_scheme
from pennyweight.schemes.quantized import grouped
from pennyweight.solvers.base import Statistics
from pennyweight.solvers.hqq import _CHUNK, Hqq, half_quadratic
from pennyweight.solvers.nearest import round_to_nearest

POWER = 0.7
SCHEMES = [
    "int4-g32-f32",
    "int3-g32-asym-f32",
    "int4-g32-fzero-f16",
    "int2-g32-offset-f16",
    "int8-tensor-f32",
    "nf4-g32-f16",
    "fp4_e2m1-g32-e8m0",
]
GAINING = ["int4-g32-f32", "int4-g32-fzero-f16", "int2-g32-offset-f16", "nf4-g32-f16"]
# Sums of float32 errors, a hundred to a group.
ROUNDING = 1e-5


def error_of(w: Tensor, scheme: Scheme, parameters: Parameters) -> Tensor:
    """sum |w - Ŵ|**0.7 of each group [rows, groups], in float64, of weights rounded to nearest."""
    decoded = round_to_nearest(w, scheme, parameters).dequantize()
    return grouped((w.double() - decoded.double()).abs().pow(POWER), scheme).sum(-1)


def papers_zeros(w: Tensor, bits: int) -> tuple[list[float], list[float]]:
    """The zero points of the paper's loop for groups `w` [n, size] whose step is 1, and the lowest sum of each.

    The loop as published, one group at a time, from the zero point that places the smallest weight at code 0; of the
    zero points on the way the one with the lowest sum of |w - Ŵ|**0.7. Codes count from 0.
    """
    zeros, sums = [], []
    for group in w.double():
        zero, beta, last, best = -group.min(), 10.0, float("inf"), (float("inf"), 0.0)
        for _ in range(21):
            codes = (group + zero).round().clamp(0, 2**bits - 1)
            left = group - (codes - zero)
            best = min(best, (float(left.abs().pow(POWER).sum()), float(zero)))
            if left.abs().mean() >= last:
                break
            last = left.abs().mean()
            # 0 to a negative power is infinite: an error of 0 is shrunk to 0.
            shrunk = left.sign() * (left.abs() - left.abs() ** (POWER - 1) / beta).clamp(min=0)
            zero = (codes - (group - shrunk)).mean()
            beta *= 1.01
        sums.append(best[0])
        zeros.append(best[1])
    return zeros, sums


def unit_steps(seed: int, bits: int) -> Tensor:
    """Groups [6, 64] with outliers, whose weights span exactly the codes' range: the step of the smallest and largest
    weight is 1."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.empty(6, 64).cauchy_(generator=generator).clamp(-20, 20)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    w = ((w - low) / (high - low) * 2**16).round() / 2**16 * (2**bits - 1)
    return w - 2 ** (bits - 1) + 0.25


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [1.0, 2.0**-7])
def test_zero_points_are_those_of_the_papers_loop(bits: int, size: float) -> None:
    scheme = parse_scheme(f"uint{bits}-channel-fzero-f32")
    moved = 0
    for seed in range(5):
        w = unit_steps(seed, bits)
        start = fit_scales(w * size, scheme, fit="minmax")
        assert torch.equal(start.scales, torch.full((6, 1), size))
        found = half_quadratic(w * size, scheme, [start])
        zeros, sums = papers_zeros(w, bits)
        assert found.zeros is not None
        assert start.zeros is not None
        torch.testing.assert_close(found.zeros[:, 0].double(), torch.tensor(zeros).double(), rtol=1e-5, atol=1e-5)
        mine = error_of(w * size, scheme, found)[:, 0] / size**POWER
        torch.testing.assert_close(mine, torch.tensor(sums).double(), rtol=1e-5, atol=1e-5)
        moved += int((found.zeros != start.zeros).sum())
    assert moved > 10


@pytest.mark.parametrize("name", SCHEMES)
def test_no_group_is_worse_than_at_its_starts(name: str) -> None:
    scheme, gained, groups = parse_scheme(name), 0, 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        w = 0.02 * torch.empty(8, 64).cauchy_(generator=generator).clamp(-50, 50)
        weight = Hqq().solve(w, scheme, Statistics()).weight
        mine = error_of(w, scheme, weight.parameters)
        least = torch.minimum(*(error_of(w, scheme, fit_scales(w, scheme, fit=fit)) for fit in ("search", "minmax")))
        assert (mine <= least * (1 + ROUNDING)).all()
        gained += int((mine < least * (1 - ROUNDING)).sum())
        groups += mine.numel()
    # Scales that are powers of two and zero points that are integers seldom have a better neighbour.
    assert name not in GAINING or gained > groups // 4


@pytest.mark.parametrize("name", ["uint4-g16-offset-uint6x2.f16", "fp4_e2m1-g16-fp8_e4m3.f32"])
def test_parents_stay_and_no_group_is_worse_than_at_the_searched_grid(name: str) -> None:
    scheme = parse_scheme(name)
    for seed in range(5):
        w = torch.empty(8, 64).cauchy_(generator=torch.Generator().manual_seed(seed)).clamp(-50, 50)
        start = fit_scales(w, scheme)
        found = Hqq().solve(w, scheme, Statistics()).weight.parameters
        assert found.parents is not None
        assert start.parents is not None
        assert torch.equal(found.parents, start.parents)
        assert (error_of(w, scheme, found) <= error_of(w, scheme, start) * (1 + ROUNDING)).all()


@pytest.mark.parametrize("name", ["int4-g32-f32", "int4-g32-offset-f32", "int3-g32-asym-f32", "nf4-g32-f32"])
def test_weights_and_their_multiples_have_the_same_codes(name: str) -> None:
    w = torch.randn(16, 64)
    scheme = parse_scheme(name)
    one, other = (Hqq().solve(w * size, scheme, Statistics()).weight for size in (1.0, 2.0**-6))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales * 2**6)


def test_one_outlier_leaves_the_others_exact() -> None:
    """31 weights lie on a grid that is off by 0.25, one far beyond its end, which least squares would follow."""
    w = torch.arange(31).remainder(4).sub(2).float().add(0.25)
    w = torch.cat([w, torch.tensor([6.0])])[None]
    scheme = parse_scheme("int2-channel-fzero-f32")
    start = Parameters(torch.ones(1, 1), torch.zeros(1, 1))
    found = half_quadratic(w, scheme, [start])
    assert found.zeros is not None
    assert found.zeros.item() == pytest.approx(-0.25, abs=0.02)


def test_data_is_not_looked_at() -> None:
    w = torch.randn(8, 64)
    scheme = parse_scheme("int4-g32-offset-f16")
    blind, seeing = Hqq().solve(w, scheme, Statistics()), Hqq().solve(w, scheme, Statistics(torch.rand(64, 64)))
    assert torch.equal(blind.weight.codes, seeing.weight.codes)


@pytest.mark.parametrize("name", ["int4-g32-f16", "int4-g32-fzero-f16", "fp4_e2m1-g32-fp8_e4m3.f32"])
def test_neither_chunks_nor_threads_change_a_bit(name: str) -> None:
    w, scheme = torch.randn(2 * _CHUNK // 64 + 100, 64), parse_scheme(name)
    start = fit_scales(w, scheme)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(half_quadratic(w, scheme, [start]))
    finally:
        torch.set_num_threads(before)
    some = slice(_CHUNK // 64 - 3, _CHUNK // 64 + 4)
    alone = half_quadratic(w[some], scheme, [start.rows(some, scheme)])
    for field in ("scales", "zeros"):
        one, other, few = (getattr(each, field) for each in (*found, alone))
        assert one is other is few is None or (torch.equal(one, other) and torch.equal(one[some], few))
