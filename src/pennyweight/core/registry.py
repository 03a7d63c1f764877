"""Plug-ins: every module of a folder that ends in `PROVIDES = (Thing(),)` is found by scanning the folder, but not the
folders in it.

Third parties provide the same objects through entry points in the group `pennyweight.<folder>`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pennyweight.core.errors import UsageError


@cache
def provided(folder: str) -> dict[str, Any]:
    """All plug-ins of `folder` ("solvers", "containers", ...), by name, in order of name."""
    package = importlib.import_module(f"pennyweight.{folder}")
    found: list[Any] = []
    for info in pkgutil.iter_modules(package.__path__):
        if info.ispkg:
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found.extend(getattr(module, "PROVIDES", ()))
    for point in entry_points(group=f"pennyweight.{folder}"):
        found.append(point.load())
    return {thing.name: thing for thing in sorted(found, key=lambda thing: str(thing.name))}


def find(folder: str, name: str) -> Any:
    """The plug-in `name` of `folder`; raises UsageError that lists the names there are."""
    known = provided(folder)
    if name not in known:
        raise UsageError(f"{name!r} is not one of the {folder}: {', '.join(known)}")
    return known[name]
