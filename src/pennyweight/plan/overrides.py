"""What the user has decided for some sites by glob, before anything is chosen for the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pennyweight.core.errors import UsageError
from pennyweight.plan.site_names import nearest_sites, sites_called
from pennyweight.schemes import Scheme, parse_scheme


@dataclass(frozen=True)
class Override:
    """glob: of site names. scheme: what they get, None to stay in float. said: how the user said it."""

    glob: str
    scheme: Scheme | None
    said: str


@dataclass(frozen=True)
class Decided:
    """The scheme of one site (None: float), and why."""

    scheme: Scheme | None
    reason: str


def parse_overrides(keep: Sequence[str], at: Sequence[str]) -> list[Override]:
    """From what follows --keep (GLOB) and --at (GLOB=SCHEME, SCHEME may be "keep"). Raises UsageError."""
    found = []
    for text in at:
        glob, equals, name = text.rpartition("=")
        if not equals or not glob:
            raise UsageError(f"--at {text}: give GLOB=SCHEME, for example '*.down_proj=int6-g32'")
        found.append(Override(glob, None if name == "keep" else parse_scheme(name), f"--at {text}"))
    # What is to stay in float does, whatever else was said of it.
    return [*found, *(Override(glob, None, f"--keep {glob}") for glob in keep)]


def decided_sites(
    sites: Sequence[str], fused: Iterable[Sequence[str]], overrides: Sequence[Override]
) -> Mapping[str, Decided]:
    """What is decided by `overrides`, the last one that matches a site, and with it for the sites `fused` with that.

    Raises UsageError for a glob that matches no site, and for sites of one fused set that were given different schemes.
    """
    found: dict[str, Decided] = {}
    for override in overrides:
        matching = sites_called(override.glob, sites)
        if not matching:
            raise UsageError(f"{override.said}: no site is called so; {nearest_sites(override.glob, sites)}")
        found.update(dict.fromkeys(matching, Decided(override.scheme, override.said)))
    for members in fused:
        _spread(members, found)
    return found


def _spread(members: Sequence[str], found: dict[str, Decided]) -> None:
    given = [(site, found[site]) for site in members if site in found]
    for site, decided in given[1:]:
        first, one = given[0]
        if decided.scheme != one.scheme:
            raise UsageError(
                f"{one.reason} and {decided.reason}: {first} and {site} are one matrix for the runtime: "
                "give both the same scheme"
            )
    for site in members:
        if given and site not in found:
            first, one = given[0]
            found[site] = Decided(one.scheme, f"{one.reason}, for {first}, with which the runtime merges it")
