"""What the user decides by glob."""

from __future__ import annotations

import pytest

from pennyweight.core.errors import UsageError
from pennyweight.plan.overrides import decided_sites, parse_overrides
from pennyweight.schemes import parse_scheme

SITES = ["layers.0.q_proj", "layers.0.k_proj", "layers.0.down_proj", "layers.1.down_proj"]


def test_the_last_override_that_matches_decides() -> None:
    decided = decided_sites(SITES, (), parse_overrides((), ("*.down_proj=int6-g32", "layers.1.*=int8-channel")))
    assert {site: str(one.scheme) for site, one in decided.items()} == {
        "layers.0.down_proj": "int6-g32",
        "layers.1.down_proj": "int8-channel",
    }


def test_keep_wins_over_a_scheme_for_the_same_site() -> None:
    decided = decided_sites(SITES, (), parse_overrides(("layers.1.*",), ("*.down_proj=int6-g32",)))
    assert decided["layers.1.down_proj"].scheme is None
    assert decided["layers.1.down_proj"].reason == "--keep layers.1.*"
    assert decided["layers.0.down_proj"].scheme == parse_scheme("int6-g32")


def test_what_is_decided_for_one_holds_for_all_that_are_fused_with_it() -> None:
    decided = decided_sites(SITES, [SITES[:2]], parse_overrides((), ("*.k_proj=int8-g128",)))
    assert decided["layers.0.q_proj"].scheme == parse_scheme("int8-g128")
    assert "layers.0.k_proj" in decided["layers.0.q_proj"].reason
    assert "layers.0.down_proj" not in decided


def test_fused_sites_may_not_be_given_different_schemes() -> None:
    overrides = parse_overrides((), ("*.k_proj=int8-g128", "*.q_proj=int4-g128"))
    with pytest.raises(UsageError, match="q_proj.*k_proj.*same scheme"):
        decided_sites(SITES, [SITES[:2]], overrides)


def test_a_glob_that_matches_nothing_names_what_is_near() -> None:
    with pytest.raises(UsageError, match=r"--keep layers\.0\.q_prj: no site.*layers\.0\.q_proj"):
        decided_sites(SITES, (), parse_overrides(("layers.0.q_prj",), ()))


@pytest.mark.parametrize("text", ["*.down_proj", "=int4-g128", "*.down_proj=int99-g1x"])
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_overrides((), (text,))
