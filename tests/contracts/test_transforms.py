"""What every rescaling that is provided must do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pennyweight.core.registry import provided
from pennyweight.schemes import parse_scheme
from pennyweight.solvers.base import Statistics
from pennyweight.stats.magnitude import Magnitude
from pennyweight.transforms.base import Rescaling, Weighed

RESCALINGS = list(provided("transforms").values())
SCHEMES = ["int4-g16-f16", "int3-channel-asym-bf16", "int8-tensor-f32"]
every_rescaling = pytest.mark.parametrize("rescaling", RESCALINGS, ids=lambda found: str(found.name))
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def readers(scheme: str, *, rows: int = 40, seed: int = 0) -> list[Weighed]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 48, generator=generator) * torch.exp(torch.randn(48, generator=generator))
    stats, magnitude = Statistics(x.T @ x / len(x)), Magnitude.zero(48).update(x)
    weights = [torch.randn(rows, 48, generator=generator), torch.randn(8, 48, generator=generator)]
    return [Weighed(w, torch.arange(48), parse_scheme(scheme), stats, magnitude) for w in weights]


def checked(s: Tensor | None, size: int) -> Tensor | None:
    if s is not None:
        assert (s.dtype, tuple(s.shape)) == (torch.float32, (size,))
        assert bool((s.isfinite() & (s > 0)).all())
    return s


@every_rescaling
@every_scheme
def test_scales_are_positive_and_the_same_every_time_on_any_number_of_threads(
    rescaling: Rescaling, scheme: str
) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(checked(rescaling.choose(readers(scheme, rows=1100), 48), 48))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert other is found[0] is None or (other is not None and torch.equal(other, found[0]))  # type: ignore[arg-type]


@every_rescaling
@every_scheme
def test_no_argument_is_edited(rescaling: Rescaling, scheme: str) -> None:
    given, kept = readers(scheme), readers(scheme)
    rescaling.choose(given, 48)
    for one, other in zip(given, kept, strict=True):
        assert torch.equal(one.w, other.w)
        assert one.stats.hessian is not None
        assert other.stats.hessian is not None
        assert torch.equal(one.stats.hessian, other.stats.hessian)


@every_rescaling
@every_scheme
def test_tied_and_foreign_columns_are_understood(rescaling: Rescaling, scheme: str) -> None:
    source = torch.cat([torch.arange(20), torch.arange(20), torch.full((8,), -1)])
    tied = [Weighed(r.w, source, r.scheme, r.stats, r.magnitude) for r in readers(scheme)]
    checked(rescaling.choose(tied, 20), 20)


@every_rescaling
@every_scheme
def test_zeros_are_no_trouble(rescaling: Rescaling, scheme: str) -> None:
    x = torch.randn(30, 48)
    x[:, 5] = 0
    w = torch.randn(16, 48)
    w[:, 7] = 0
    stats = Statistics(x.T @ x / 30)
    magnitude = Magnitude.zero(48).update(x)
    for weight, given, sizes in (
        (w, stats, magnitude),
        (torch.zeros(16, 48), stats, magnitude),
        (w, Statistics(torch.zeros(48, 48)), Magnitude.zero(48)),
    ):
        one = Weighed(weight, torch.arange(48), parse_scheme(scheme), given, sizes)
        checked(rescaling.choose([one], 48), 48)


@every_rescaling
def test_without_data_nothing_is_chosen(rescaling: Rescaling) -> None:
    one = Weighed(torch.randn(4, 16), torch.arange(16), parse_scheme("int4-g16-f16"), Statistics())
    assert rescaling.choose([one], 16) is None
    assert rescaling.choose([], 16) is None
