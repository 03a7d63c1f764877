"""Versions of Pennyweight and of what the result of a run depends on."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import pennyweight

_PARTS = ("torch", "transformers", "compressed-tensors", "safetensors", "gguf")


@cache
def versions(parts: tuple[str, ...] = _PARTS) -> dict[str, str]:
    """Name -> installed version, "absent" where there is none."""
    return {"pennyweight": pennyweight.__version__} | {name: _of(name) for name in parts}


def _of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
