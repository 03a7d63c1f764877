"""Metadata of a GGUF file: keys with values of an exact type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf

_INFERRED = gguf.GGUFValueType.get_type


@dataclass(frozen=True)
class Field:
    """A value of the GGUF type `type`; for an array a tuple, and `element` is the type of its members."""

    value: Any
    type: gguf.GGUFValueType
    element: gguf.GGUFValueType | None = None


def fields_of(writer: gguf.GGUFWriter) -> dict[str, Field]:
    """What was added to `writer`, in order. gguf's own methods choose key and type of each field."""
    return {key: _field(stored.value, stored.type, stored.sub_type) for key, stored in writer.kv_data[0].items()}


def _field(value: Any, kind: gguf.GGUFValueType, element: gguf.GGUFValueType | None) -> Field:
    if kind is not gguf.GGUFValueType.ARRAY:
        return Field(_plain(value), kind)
    values = tuple(_plain(member) for member in value)
    return Field(values, kind, element if element is not None else _INFERRED(values[0]))


def _plain(value: Any) -> Any:
    """Members of gguf's enumerations as integers, bytes as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
