"""The uniform plan: the scheme asked for, or the nearest that the target accepts, and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pennyweight.plan.uniform import uniform_plan
from pennyweight.schemes import PerChannel, PerGroup, PerTensor, Scheme, parse_scheme

G128 = parse_scheme("int4-g128-f16")
WhyNot = Callable[[Scheme, str], str | None]


def accepts_all(scheme: Scheme, site: str) -> str | None:
    return None


def multiples_of(step: int, *, channel: bool = True) -> WhyNot:
    """A target that holds groups of a multiple of `step`, and one scale per channel if `channel`."""

    def why_not(scheme: Scheme, site: str) -> str | None:
        match scheme.granularity:
            case PerGroup(size):
                return f"groups of {size} are no multiple of {step}" if size % step else None
            case PerChannel():
                return None if channel else "one scale per channel is not read"
            case PerTensor():
                return "one scale per tensor is not read"

    return why_not


def test_what_fits_is_left_as_asked() -> None:
    plan = uniform_plan({"a": (4, 256), "b": (7, 128)}, G128, accepts_all)
    assert plan.schemes == {"a": G128, "b": G128}
    assert (plan.kept, plan.changed) == ({}, {})


@pytest.mark.parametrize(
    ("inputs", "step", "expected"),
    [(172, 1, "int4-g86-f16"), (172, 2, "int4-g86-f16"), (172, 4, "int4-g4-f16"), (172, 8, "int4-channel-f16"),
     (96, 32, "int4-g96-f16"), (160, 32, "int4-g32-f16"), (192, 32, "int4-g96-f16"), (173, 1, "int4-channel-f16"),
     (1, 1, "int4-channel-f16")],
)  # fmt: skip
def test_the_largest_divisor_that_the_target_accepts_takes_the_place(inputs: int, step: int, expected: str) -> None:
    plan = uniform_plan({"site": (3, inputs)}, G128, multiples_of(step))
    assert plan.schemes["site"].name == expected
    assert plan.kept == {}
    assert plan.changed == {
        "site": f"{expected} in place of int4-g128-f16: groups of 128 do not divide {inputs} inputs"
    }


@pytest.mark.parametrize("inputs", [1, 60, 97, 172, 384, 1000, 1024])
@pytest.mark.parametrize("step", [1, 2, 3, 16])
def test_every_divisor_was_considered(inputs: int, step: int) -> None:
    fitting = [size for size in range(2, 129) if inputs % size == 0 and size % step == 0]
    scheme = uniform_plan({"site": (3, inputs)}, G128, multiples_of(step)).schemes["site"]
    assert scheme.granularity == (PerGroup(max(fitting)) if fitting else PerChannel())
    scheme.storage_bits((3, inputs))


def test_a_size_that_divides_but_is_refused_gives_way_with_the_targets_reason() -> None:
    plan = uniform_plan({"site": (3, 500)}, parse_scheme("int4-g50-f16"), multiples_of(4))
    assert plan.changed == {"site": "int4-g20-f16 in place of int4-g50-f16: groups of 50 are no multiple of 4"}


def test_what_nothing_fits_stays_in_float_with_a_reason() -> None:
    shapes = {"good": (3, 256), "bad": (3, 172)}
    plan = uniform_plan(shapes, G128, multiples_of(8, channel=False))
    assert plan.schemes == {"good": G128}
    assert list(plan.kept) == ["bad"]
    assert "groups of 128 do not divide 172 inputs" in plan.kept["bad"]
    assert "one scale per channel is not read" in plan.kept["bad"]


def test_a_refused_channel_scheme_stays_in_float_and_a_refused_tensor_scheme_tries_channels() -> None:
    refused = uniform_plan({"site": (3, 64)}, parse_scheme("int8-channel-f16"), multiples_of(8, channel=False))
    assert refused.kept == {"site": "one scale per channel is not read"}
    tensor = uniform_plan({"site": (3, 64)}, parse_scheme("int8-tensor-f16"), multiples_of(8))
    assert tensor.schemes["site"].name == "int8-channel-f16"
    assert tensor.changed == {"site": "int8-channel-f16 in place of int8-tensor-f16: one scale per tensor is not read"}


def test_the_target_may_refuse_one_site_only() -> None:
    def why_not(scheme: Scheme, site: str) -> str | None:
        return "the router stays in float" if site == "router" else None

    plan = uniform_plan({"router": (3, 128), "other": (3, 128)}, G128, why_not)
    assert plan.kept == {"router": "the router stays in float"}
    assert plan.schemes == {"other": G128}
