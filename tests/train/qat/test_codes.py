"""Weights from which training goes on with given codes."""

from __future__ import annotations

import pytest
import torch

from pennyweight.schemes import QuantizedWeight, fit_scales, parse_scheme
from pennyweight.solvers.nearest import round_to_nearest
from pennyweight.train.qat.codes import nearest_of_codes

SCHEMES = ["int2-channel", "int4-g4", "uint3-channel-asym", "int8-tensor", "nf4-channel"]


def other_codes(w: torch.Tensor, name: str) -> QuantizedWeight:
    """Codes that a solver might have chosen: some beside the nearest."""
    scheme = parse_scheme(name).with_scale_dtype(torch.float32)
    nearest = round_to_nearest(w, scheme, fit_scales(w, scheme))
    shift = torch.randint(-1, 2, w.shape)
    codes = (nearest.codes.to(torch.int16) + shift).clamp(0, 2**scheme.element.bits - 1).to(torch.uint8)
    return QuantizedWeight.of(codes, nearest.parameters, scheme)


@pytest.mark.parametrize("name", SCHEMES)
def test_they_round_to_the_codes(name: str) -> None:
    w = torch.randn(6, 8)
    weight = other_codes(w, name)
    moved = nearest_of_codes(w, weight)
    assert torch.equal(round_to_nearest(moved, weight.scheme, weight.parameters).codes, weight.codes)


@pytest.mark.parametrize("name", SCHEMES[:4])
def test_they_move_no_further_than_they_must(name: str) -> None:
    """What rounds to its code already stays; what does not ends beside the edge of the code's cell."""
    w = torch.randn(6, 8)
    weight = other_codes(w, name)
    moved = nearest_of_codes(w, weight)
    is_right = round_to_nearest(w, weight.scheme, weight.parameters).codes == weight.codes
    steps = (moved - w).abs() / weight.parameters.decoded(weight.scheme).scales.abs().expand(
        -1, weight.parameters.scales.shape[1]
    ).repeat_interleave(w.shape[1] // weight.parameters.scales.shape[1], dim=1)
    assert steps[is_right].max() < 0.02
    # (Beyond the ends of the range a little more.)
    assert steps[~is_right].max() < 1.5
