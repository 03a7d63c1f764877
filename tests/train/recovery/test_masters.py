"""Masters begin where they were, and the slopes of a site's parameters are those of its decoded weight."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pennyweight.models.base import Site
from pennyweight.schemes import QuantizedWeight, Scheme, parse_scheme
from pennyweight.schemes.parameters import Parameters
from pennyweight.train.recovery.masters import Master, TrainedSite, vector_master

SHAPE = (6, 32)
# Everything that is trained, in one scheme or another; float32 where it is stored as a float, so nothing is rounded.
SCHEMES = [
    "int3-g8-f32",
    "int4-channel-f32",
    "int4-tensor-f32",
    "uint4-g8-asym-f32",
    "uint4-g8-fzero-f32",
    "uint3-g8-offset-f32",
    "uint4-g8-offset-uint6x2.f32",
    "int4-g8-int8.f32",
    "uint4-channel-offset-f32",
]


def _weight(scheme: Scheme) -> QuantizedWeight:
    """Any codes with any parameters of the right types."""
    made = torch.Generator().manual_seed(0)

    def floats(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=made)

    def codes(shape: tuple[int, ...], bits: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=made, dtype=torch.uint8)

    shape = scheme.scale_shape(SHAPE)
    parts: dict[str, Tensor | None] = {}
    for name, parent, spec in (
        ("scales", "parents", scheme.scale),
        ("offsets", "offset_parents", scheme.offset),
    ):
        if spec is not None:
            parts[name] = floats(shape) if spec.element is None else codes(shape, spec.bits)
            parts[parent] = floats(spec.parent_shape(shape)) if spec.parent is not None else None
    if scheme.zero is not None:
        whole = torch.randint(0, 8, shape, generator=made, dtype=torch.int16)
        parts["zeros"] = whole if scheme.has_integer_zero else floats(shape)
    return QuantizedWeight.of(codes(SHAPE, scheme.element.bits), Parameters(**parts), scheme)  # type: ignore[arg-type]


def _site(name: str) -> TrainedSite:
    return TrainedSite.of(Site("site", SHAPE, 0, "linear", "site.weight"), _weight(parse_scheme(name)))


@pytest.mark.parametrize("name", SCHEMES)
def test_slopes_are_those_of_finite_differences(name: str) -> None:
    """The decoded weight is linear in each parameter by itself: a difference of any length is the slope, in float64."""
    site = _site(name)
    dw = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    slopes = site.slopes(dw)
    assert set(slopes) == set(site.masters)
    assert slopes

    def value() -> float:
        return float((site.weight.dequantize().double() * dw.double()).sum())

    for part, master in site.masters.items():
        for place in range(0, master.step.numel(), 5):
            flat = master.step.view(-1)
            flat[place] = 0.5
            up = value()
            flat[place] = -0.5
            down = value()
            flat[place] = 0
            # float32 decoding of numbers of size 100.
            assert slopes[part].flatten()[place].item() == pytest.approx(up - down, rel=1e-4, abs=1e-3), part


@pytest.mark.parametrize("name", ["int3-g8-bf16", "uint4-g8-fzero-f16", "uint4-g8-offset-uint6x2.f16"])
def test_a_site_that_has_not_moved_is_the_given_one_bit_for_bit(name: str) -> None:
    site = _site(name.replace("bf16", "f32").replace("f16", "f32"))
    start = site.start
    site = TrainedSite.of(site.site, _rounded(start, parse_scheme(name)))
    for given, now in zip(_parts(site.start), _parts(site.weight), strict=True):
        assert (given is None and now is None) or (given is not None and now is not None and torch.equal(given, now))


def _rounded(weight: QuantizedWeight, scheme: Scheme) -> QuantizedWeight:
    kind = torch.bfloat16 if "bf16" in scheme.name else torch.float16
    parts = [part.to(kind) if part is not None and part.is_floating_point() else part for part in _parts(weight)]
    return QuantizedWeight.of(weight.codes, Parameters(*parts), scheme)  # type: ignore[arg-type]


def _parts(weight: QuantizedWeight) -> list[Tensor | None]:
    p = weight.parameters
    return [p.scales, p.zeros, p.offsets, p.parents, p.offset_parents]


def test_values_are_rounded_to_the_stored_type_and_steps_are_not() -> None:
    master = Master.of(torch.tensor([1.0, -2.0, 0.0], dtype=torch.bfloat16), unit=torch.tensor([1.0, 2.0, 0.0]))
    master.step.fill_(1e-3)
    assert master.value.tolist() == [1.0, -2.0, 0.0]
    master.step.fill_(1e-2)
    assert master.value.tolist() == [1.0078125, -1.9765625, 0.0]
    assert replace(master, step=torch.full((3,), 1e38)).value.isfinite().all()


def test_a_vector_of_zeros_can_move() -> None:
    master = vector_master(torch.zeros(4))
    master.step.fill_(0.5)
    assert master.value.tolist() == [0.5] * 4
    assert vector_master(torch.tensor([3.0, -4.0])).unit.item() == pytest.approx(12.5**0.5)


def test_a_step_goes_twice_as_far_with_each_bit_fewer() -> None:
    units = [_site(f"uint{bits}-g8-offset-f32").masters for bits in (2, 3, 4)]
    for coarse, fine in pairwise(units):
        ratio = coarse["scales"].unit / coarse["scales"].start.abs(), fine["scales"].unit / fine["scales"].start.abs()
        torch.testing.assert_close(ratio[0], 2 * ratio[1])
        torch.testing.assert_close(coarse["offsets"].unit, coarse["scales"].unit)
    assert vector_master(torch.ones(4), bits=3).unit.item() == 2
