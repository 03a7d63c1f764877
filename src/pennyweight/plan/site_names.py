"""Sites as people name them: by name, or by a pattern for several."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase


def sites_called(name: str, sites: Collection[str]) -> list[str]:
    """The site of that name, else all that `name` matches as a pattern with *, ? and []."""
    return [name] if name in sites else [site for site in sites if fnmatchcase(site, name)]


def nearest_sites(name: str, sites: Sequence[str]) -> str:
    """What a message says of a `name` that is none of `sites`."""
    near = difflib.get_close_matches(name, sites, n=1)
    return f"the nearest name is {near[0]!r}" if near else f"it has {some(sites)}"


def some(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
