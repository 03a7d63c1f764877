"""Number formats: sets of values and their codes; no scales and no bytes here."""

from __future__ import annotations

from pennyweight.core.registry import find
from pennyweight.formats.base import NumberFormat

__all__ = ["NumberFormat", "number_format"]


def number_format(name: str) -> NumberFormat:
    """The number format called `name`, e.g. "int4"; raises UsageError that lists those there are."""
    found: NumberFormat = find("formats", name)
    return found
