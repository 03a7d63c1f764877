"""Versions of Pennyweight and of what the result of a run depends on."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import pennyweight

_PARTS = ("torch", "transformers", "compressed-tensors", "safetensors", "gguf")


@cache
def versions() -> dict[str, str]:
    """Name -> installed version, "absent" where there is none."""
    return {"pennyweight": pennyweight.__version__} | {name: _of(name) for name in _PARTS}


def _of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
