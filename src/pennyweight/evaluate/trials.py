"""Trials that were made before, in a file beside the model."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pennyweight.core.files import to_json, write_text
from pennyweight.pipeline.costs.cache import kept_beside


@dataclass(frozen=True)
class Measured:
    """What was lost by a plan that was made, in the unit of the budget; upper: its bound of 99 %. Of a task: its metric
    of the original and of the plan, in points."""

    loss: float
    upper: float
    original: float | None = None
    metric: float | None = None


@dataclass(frozen=True)
class KeptTrials:
    """What was measured of plans of `model` by one judge, whose content is `key`.

    A plan is known by all that shapes it, so a run that was killed, or one of another limit, makes none of them again.
    """

    model: Path
    key: str

    @property
    def paths(self) -> list[Path]:
        return kept_beside(self.model, f"trials-{self.key}.json")

    def read(self) -> dict[str, Measured]:
        """By the key of the plan; a file that is damaged counts as absent."""
        known: dict[str, Measured] = {}
        for path in reversed(self.paths):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                known |= _checked(json.loads(path.read_text(encoding="utf-8")), self.key)
        return known

    def add(self, plan: str, measured: Measured) -> None:
        """Written whole or not at all; where no place can be written, the next run makes the plan again."""
        trials = {key: asdict(one) for key, one in {**self.read(), plan: measured}.items()}
        for path in self.paths:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, to_json({"key": self.key, "trials": trials}))
                return


def _checked(content: Any, key: str) -> dict[str, Measured]:
    """The trials in a file's content; raises ValueError, KeyError, TypeError or AttributeError where it is damaged."""
    known = {plan: Measured(**one) for plan, one in content["trials"].items()}
    figures = [value for one in known.values() for value in asdict(one).values() if value is not None]
    if content["key"] != key or not all(math.isfinite(value) for value in figures):
        raise ValueError("not the trials of this key")
    return known
