"""The metadata that gguf's own writer would write."""

from __future__ import annotations

from typing import Any

import gguf

from pennyweight.models.gguf.fields import FieldValue

_INFERRED = gguf.GGUFValueType.get_type


def fields_of(writer: gguf.GGUFWriter) -> dict[str, FieldValue]:
    """What was added to `writer`, in order. gguf's own methods choose key and type of each field."""
    return {key: _field(stored.value, stored.type, stored.sub_type) for key, stored in writer.kv_data[0].items()}


def _field(value: Any, kind: gguf.GGUFValueType, element: gguf.GGUFValueType | None) -> FieldValue:
    if kind is not gguf.GGUFValueType.ARRAY:
        return FieldValue.of(_plain(value), kind)
    values = [_plain(member) for member in value]
    return FieldValue.array(values, element if element is not None else _INFERRED(values[0]))


def _plain(value: Any) -> Any:
    """Members of gguf's enumerations as integers, bytes as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
