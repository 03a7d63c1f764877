"""A plan as a file: written by us, edited by hand, given back.

    {"pennyweight_plan": 1,
     "sites": {"*": "int4-g128", "*.down_proj": "int6-g32", "lm_head": "keep"}}

`sites` maps the name of a site, or a pattern with *, ? and [] for several, to the name of a scheme or to "keep"; a
later entry takes precedence over an earlier one. The other keys say where the plan came from and are not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.core.errors import UsageError
from pennyweight.core.files import to_json, write_text
from pennyweight.plan.choices import choice_name, named_choice
from pennyweight.plan.site_names import nearest_sites, sites_called, some
from pennyweight.schemes import Scheme

_VERSION = 1
_KEYS = ("pennyweight_plan", "model", "runtime", "budget", "size_bytes", "predicted_loss", "sites")


def write_plan_file(
    path: Path,
    schemes: Mapping[str, Scheme | None],
    *,
    sites: Sequence[str],
    model: str,
    runtime: str,
    budget: Mapping[str, str | int | float] | None,
    size_bytes: int,
    predicted_loss: float,
) -> None:
    """Write the scheme of each of `sites` (None: kept in float) in that order, the whole file or nothing."""
    names = {site: choice_name(schemes[site]) for site in sites}
    values = (_VERSION, model, runtime, budget, size_bytes, predicted_loss, names)
    write_text(path, to_json(dict(zip(_KEYS, values, strict=True))))


@dataclass(frozen=True)
class PlanEntries:
    """What somebody gave each site: `entries` in their order, from the name or pattern of sites to the name of a scheme
    or "keep". `source` is what messages call it."""

    source: str
    entries: Mapping[str, str]

    def schemes(self, sites: Sequence[str]) -> dict[str, Scheme | None]:
        """The scheme of each of the model's `sites`, in their order; None: kept in float.

        Raises UsageError for a site or a scheme that is not known, and for sites left without an entry.
        """
        schemes: dict[str, Scheme | None] = {}
        known = dict.fromkeys(sites)
        for key, name in self.entries.items():
            matches = sites_called(key, known)
            if not matches:
                raise UsageError(f"{self.source}: the model has no site {key!r}; {nearest_sites(key, sites)}")
            schemes |= dict.fromkeys(matches, self._scheme(key, name))
        missing = [site for site in sites if site not in schemes]
        if missing:
            raise UsageError(
                f"{self.source}: {len(missing)} of {len(sites)} sites have no entry: {some(missing)}. "
                'Give each a scheme or "keep"; "*" as the first entry stands for all that no later one names'
            )
        return {site: schemes[site] for site in sites}

    def _scheme(self, key: str, name: object) -> Scheme | None:
        if not isinstance(name, str):
            raise UsageError(
                f'{self.source}: {key}: {name!r} is not the name of a scheme, for example "int4-g128", or "keep"'
            )
        try:
            return named_choice(name)
        except UsageError as error:
            raise UsageError(f"{self.source}: {key}: {error}") from error


@dataclass(frozen=True)
class PlanName:
    """A plan that the container knows by name, "Q4_K_M". `source` is what messages call it."""

    source: str


def given_plan(given: str | Path | Mapping[str, str] | None) -> PlanEntries | PlanName | None:
    """The plan of a file or of a mapping, or its name where there is no file called so.

    Raises UsageError for a file that cannot be read.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return PlanEntries("the plan", given)
    is_name = isinstance(given, str) and not Path(given).exists()
    return PlanName(str(given)) if is_name else read_plan_file(Path(given))


def read_plan_file(path: Path) -> PlanEntries:
    """Raises UsageError for a file or a key of it that cannot be read."""
    return PlanEntries(str(path), _entries(path))


def _entries(path: Path) -> dict[str, Any]:
    """The `sites` of the file, as they stand there."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unrepeated)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): name a plan file") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a plan file: {error}") from error
    if not isinstance(plan, dict) or "pennyweight_plan" not in plan:
        raise UsageError(f'{path} is not a plan file: it has to be a JSON object with "pennyweight_plan": {_VERSION}')
    if plan["pennyweight_plan"] != _VERSION:
        raise UsageError(f"{path}: a plan file of version {plan['pennyweight_plan']!r}; version {_VERSION} can be read")
    for key in plan:
        if key not in _KEYS:
            raise UsageError(f"{path}: unknown key {key!r}; there are {', '.join(_KEYS)}")
    entries = plan.get("sites")
    if not isinstance(entries, dict):
        raise UsageError(f'{path}: "sites" has to be an object that gives each site a scheme or "keep"')
    return entries


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two equal keys JSON keeps the place of the first and the value of the last: neither order would be meant."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} is there twice; leave one of them")
        result[key] = value
    return result
