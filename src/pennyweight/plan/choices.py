"""What an allocation chooses from: groups of sites, and the ways to store each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pennyweight.core.errors import UsageError
from pennyweight.schemes import Scheme, parse_scheme

KEEP = "keep"


@dataclass(frozen=True)
class Choice:
    """One way to store a group.

    scheme: None where the group is kept in float. size_bytes: all tensors of the group's sites, as written.
    cost: the loss increase predicted, finite and not negative.
    """

    scheme: Scheme | None
    size_bytes: int
    cost: float


@dataclass(frozen=True)
class Group:
    """Sites that must share a scheme, and what they may share. Files and messages call it by its first site."""

    sites: tuple[str, ...]
    choices: tuple[Choice, ...]


def smallest(groups: Sequence[Group]) -> int:
    """Bytes of the smallest plan: no budget below it can be met."""
    return sum(min(choice.size_bytes for choice in group.choices) for group in groups)


def choice_name(scheme: Scheme | None) -> str:
    """What files say for a site: the scheme's name, or "keep"."""
    return KEEP if scheme is None else scheme.name


@lru_cache(maxsize=1024)
def named_choice(name: str) -> Scheme | None:
    """The scheme of a name that `choice_name` gives; None for "keep". Raises UsageError."""
    try:
        return None if name == KEEP else parse_scheme(name)
    except UsageError as error:
        raise UsageError(f"{error}; or {KEEP}, to leave the site in float") from error
