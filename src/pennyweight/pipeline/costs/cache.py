"""Costs that were measured before, in a file beside the model."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pennyweight.core.files import to_json, write_text
from pennyweight.core.version import versions
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.costs.base import Cost, Tell, tell_nobody
from pennyweight.plan.candidates import Candidates
from pennyweight.solvers.base import Solver

# The directory beside a model's files.
DIRECTORY = ".pennyweight"
# Names of a group's sites, a line each -> name of a scheme -> cost.
Known = dict[str, dict[str, float]]


def kept_beside(model: Path, name: str) -> list[Path]:
    """Where a file that is kept for the next run may be: beside the model in the directory `model`, or where that can't
    be written, with the user's other caches."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [parent / name for parent in (model / DIRECTORY, user / "pennyweight")]


@dataclass(frozen=True)
class CostCache:
    """The costs of one key: `about` says what they depend on, `model` is the directory of the model."""

    model: Path
    about: Mapping[str, Any]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def paths(self) -> list[Path]:
        return kept_beside(self.model, f"costs-{self.key}.json")

    def read(self) -> Known:
        """What is known from before; a file that is damaged counts as absent."""
        known: Known = {}
        for path in reversed(self.paths):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                known |= _checked(json.loads(path.read_text(encoding="utf-8")), self.key)
        return known

    def write(self, known: Known) -> None:
        """Write `known` whole or not at all; where no place can be written, the next run measures again."""
        content = to_json({"key": self.key, "about": self.about, "costs": known})
        for path in self.paths:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, content)
                return


def _checked(content: Any, key: str) -> Known:
    """The costs in a file's content; raises ValueError, KeyError, TypeError or AttributeError where it is damaged."""
    known: Known = {
        sites: {scheme: float(cost) for scheme, cost in costs.items()} for sites, costs in content["costs"].items()
    }
    is_sound = all(math.isfinite(cost) and cost >= 0 for costs in known.values() for cost in costs.values())
    if content["key"] != key or not is_sound:
        raise ValueError("not the costs of this key")
    return known


def cached_costs(
    cost: Cost,
    model: StreamedModel,
    batches: Sequence[Tensor],
    groups: Sequence[Candidates],
    *,
    inputs: Mapping[str, str],
    solver: Solver,
    seed: int,
    scratch: Path,
    tell: Tell = tell_nobody,
) -> list[list[float]]:
    """What `cost.measure` gives; only what is not known from before is measured. `inputs` are the SHA-256 of the
    model's files by name; what reads other weights from them than they hold, a rotation, has an entry of its own."""
    cache = CostCache(model.path, _about(cost, model, batches, inputs=inputs, solver=solver, seed=seed))
    known = cache.read()
    missing = [group for group in (_unknown(group, known) for group in groups) if group.schemes]
    if missing:
        measured = cost.measure(model, batches, missing, solver=solver, seed=seed, scratch=scratch, tell=tell)
        for group, costs in zip(missing, measured, strict=True):
            found = known.setdefault(_name(group), {})
            found.update({s.name: value for s, value in zip(group.schemes, costs, strict=True) if s is not None})
        cache.write(known)
    return [
        [0.0 if scheme is None else known[_name(group)][scheme.name] for scheme in group.schemes] for group in groups
    ]


def _about(
    cost: Cost,
    model: StreamedModel,
    batches: Sequence[Tensor],
    *,
    inputs: Mapping[str, str],
    solver: Solver,
    seed: int,
) -> dict[str, Any]:
    """Everything that a cost depends on but its group and its scheme. Settings of plug-ins are those of their repr."""
    tokens = hashlib.sha256()
    for windows in (window for ids in batches for window in ids):
        tokens.update(f"{windows.numel()} ".encode() + windows.cpu().long().numpy().tobytes())
    return {
        "inputs": dict(sorted(inputs.items())),
        "checkpoint": type(model.checkpoint).__name__,
        "tokens": tokens.hexdigest(),
        "cost": repr(cost),
        "solver": repr(solver),
        "seed": seed,
        "device": model.device.type,
        "versions": versions(),
    }


def _unknown(group: Candidates, known: Known) -> Candidates:
    """The group with those of its schemes whose cost is not known."""
    before = known.get(_name(group), {})
    return Candidates(group.sites, tuple(s for s in group.schemes if s is not None and s.name not in before))


def _name(group: Candidates) -> str:
    return "\n".join(sorted(group.sites))
