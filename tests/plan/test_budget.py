"""Budgets as they are written."""

from __future__ import annotations

import pytest

from pennyweight.core.errors import UsageError
from pennyweight.plan.budget import Budget, parse_budget, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("3.5 GiB", 7 * 2**29),
        ("700mb", 7 * 10**8),
        ("12kb", 12_000),
        ("1TiB", 2**40),
        ("123456", 123456),
        (10**9, 10**9),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 apples", "-1GB", "4G B", "1e9"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="4GB"):
        parse_size(text)


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02), (0.03, 0.03)])
def test_shares(text: str | float, share: float) -> None:
    assert parse_budget(max_loss=text) == Budget("max-loss", pytest.approx(share))


@pytest.mark.parametrize("text", ["1", "5", "one percent"])
def test_a_share_of_a_hundred_per_cent_without_its_sign_is_taken_for_a_slip(text: str) -> None:
    with pytest.raises(UsageError, match="1%"):
        parse_budget(max_loss=text)


def test_one_budget_at_most() -> None:
    assert parse_budget() is None
    with pytest.raises(UsageError, match="--size and --bpw"):
        parse_budget(size="4GB", bpw=3.5)


@pytest.mark.parametrize("bpw", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_a_positive_number(bpw: float) -> None:
    with pytest.raises(UsageError, match="above 0"):
        parse_budget(bpw=bpw)
