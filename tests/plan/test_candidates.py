"""What each site may be stored as."""

from __future__ import annotations

from itertools import pairwise

import torch

from pennyweight.plan.candidates import Candidates, candidates
from pennyweight.plan.overrides import Decided
from pennyweight.schemes import PerGroup, Scheme, parse_scheme


def _all(shapes: dict[str, tuple[int, int]], **given: object) -> list[Candidates]:
    arguments: dict[str, object] = dict(fused=(), decided={}, finish=lambda one: one, why_not=lambda scheme, site: None)
    return candidates(shapes, **{**arguments, **given})  # type: ignore[arg-type]


def _names(one: Candidates) -> list[str]:
    return [str(scheme) for scheme in one.schemes]


def test_every_site_may_also_stay_in_float() -> None:
    [one] = _all({"a": (8, 256)})
    assert one.schemes[-1] is None
    assert "int2-g128" in _names(one)
    assert "int8-g128" in _names(one)


def test_group_sizes_that_do_not_divide_are_replaced_and_none_is_there_twice() -> None:
    [one] = _all({"a": (8, 172)})
    groups = [scheme.granularity.size for scheme in one.schemes if scheme and isinstance(scheme.granularity, PerGroup)]
    assert groups
    assert all(172 % size == 0 for size in groups)
    assert len(set(one.schemes)) == len(one.schemes)


def test_fused_sets_that_overlap_are_one_and_share_what_all_of_them_take() -> None:
    def why_not(scheme: Scheme, site: str) -> str | None:
        return "no" if site == "c" and scheme.element.bits < 4 else None

    shapes = {"a": (8, 128), "b": (8, 128), "c": (8, 128), "d": (8, 128)}
    found = _all(shapes, fused=[("b", "a"), ("b", "c")], why_not=why_not)
    assert [one.sites for one in found] == [("a", "b", "c"), ("d",)]
    assert min(scheme.element.bits for scheme in found[0].schemes if scheme) == 4
    assert min(scheme.element.bits for scheme in found[1].schemes if scheme) == 2


def test_what_is_decided_is_the_only_candidate() -> None:
    given = {"a": Decided(parse_scheme("int6-g32"), "asked"), "b": Decided(None, "kept")}
    assert [one.schemes for one in _all({"a": (8, 64), "b": (8, 64)}, decided=given)] == [
        (parse_scheme("int6-g32"),),
        (None,),
    ]


def test_a_set_that_holds_most_weights_has_finer_steps() -> None:
    shapes = {f"experts.{number}": (64, 128) for number in range(8)} | {"q": (8, 128)}
    fused = [list(shapes)[:8]]
    experts, single = _all(shapes, fused=fused, finish=lambda one: one.with_scale_dtype(torch.bfloat16))
    assert len(experts.schemes) > 2 * len(single.schemes)
    sizes = sorted(scheme.storage_bits((64, 128)) for scheme in experts.schemes if scheme)
    assert max(after / before for before, after in pairwise(sizes)) < 1.21
