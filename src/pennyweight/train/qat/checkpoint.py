"""A training on the disk, to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pennyweight.core.errors import CheckpointError
from pennyweight.core.files import replacing

_VERSION = 1


def save(path: Path, recipe: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write what was trained so far, whole or not at all."""
    with replacing(path) as file:
        torch.save({"version": _VERSION, "recipe": dict(recipe), "state": dict(state)}, file)


def load(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `save` wrote. Raises CheckpointError for a file that is none, or of another training."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        version, known, state = found["version"], found["recipe"], dict(found["state"])
    except Exception as error:
        raise CheckpointError(f"{path}: no checkpoint of a training: delete it, or give another name") from error
    if version != _VERSION or known != recipe:
        differing = sorted(name for name in {*known, *recipe} if known.get(name) != recipe.get(name))
        raise CheckpointError(
            f"{path} is of another training ({', '.join(differing) or 'an older version'} differ): give the same "
            "arguments, delete it, or give another name"
        )
    return state
