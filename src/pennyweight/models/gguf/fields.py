"""The metadata values of a GGUF file, kept as the bytes that the file holds and decoded when asked for.

    number, bool   its bytes, little endian; a bool takes one
    string         8 bytes length, then the bytes (UTF-8 by the rules, anything in practice)
    array          4 bytes type of the elements, 8 bytes count, then the elements one after the other

A value stands behind the four bytes of its type. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gguf.constants import GGUFValueType

from pennyweight.core.errors import ContainerError

# How struct calls what has a fixed size.
NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class FieldValue:
    """A metadata value and its exact type; equal where the bytes are.

    kind   type of the value, or of the elements of an array
    raw    the value's bytes as in the file, without the type (and, of an array, without the count)
    count  elements of an array, None where the value is none
    """

    kind: GGUFValueType
    raw: bytes = field(repr=False)
    count: int | None = None

    @classmethod
    def of(cls, value: Any, kind: GGUFValueType) -> FieldValue:
        """`value` stored as `kind`; raises ContainerError where it does not fit.

        >>> FieldValue.of(7, GGUFValueType.UINT16).raw
        b'\\x07\\x00'
        """
        return cls(kind, _packed([value], kind))

    @classmethod
    def array(cls, values: Sequence[Any], kind: GGUFValueType) -> FieldValue:
        """`values`, each stored as `kind`; raises ContainerError where one does not fit.

        >>> FieldValue.array(["a", "bc"], GGUFValueType.STRING).value
        ['a', 'bc']
        """
        return cls(kind, _packed(values, kind), len(values))

    @cached_property
    def value(self) -> Any:
        """int, float, bool or str, or a list of them; bytes of a string that are not UTF-8 become lone surrogates."""
        if self.kind is GGUFValueType.STRING:
            found: list[Any] = _strings(self.raw, 1 if self.count is None else self.count)
        else:
            form = NUMBERS[self.kind]
            found = list(struct.unpack(f"<{len(self.raw) // struct.calcsize('<' + form)}{form}", self.raw))
        return found[0] if self.count is None else found

    @property
    def encoded(self) -> bytes:
        """The bytes behind the key in a file: type and value."""
        if self.count is None:
            return struct.pack("<I", self.kind) + self.raw
        return struct.pack("<IIQ", GGUFValueType.ARRAY, self.kind, self.count) + self.raw


def encoded_text(text: str) -> bytes:
    """Length and bytes of `text`; lone surrogates become the bytes that they were read from."""
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ContainerError(f"{text[:80]!r} cannot be stored in GGUF as text ({error.reason}): correct it") from error
    return _LENGTH.pack(len(raw)) + raw


def decoded_text(raw: bytes) -> str:
    """The text whose bytes are `raw`; what is not UTF-8 becomes lone surrogates, so that nothing is lost."""
    return raw.decode("utf-8", "surrogateescape")


def _strings(raw: bytes, count: int) -> list[str]:
    found, position = [], 0
    for _ in range(count):
        begin = position + 8
        position = begin + _LENGTH.unpack_from(raw, position)[0]
        found.append(raw[begin:position].decode("utf-8", "surrogateescape"))
    return found


def _packed(values: Iterable[Any], kind: GGUFValueType) -> bytes:
    values = list(values)
    if kind is GGUFValueType.STRING:
        _check_class(values, str, kind)
        return b"".join(encoded_text(value) for value in values)
    if kind not in NUMBERS:
        raise ContainerError(
            f"GGUF: values of type {kind.name} cannot be stored here; an array holds plain values only"
        )
    if kind is GGUFValueType.BOOL:
        _check_class(values, bool, kind)
    try:
        return struct.pack(f"<{len(values)}{NUMBERS[kind]}", *values)
    except (struct.error, OverflowError) as error:
        shown = repr(values if len(values) > 1 else values[0])
        raise ContainerError(f"GGUF: {shown[:80]} cannot be stored as {kind.name}: {error}") from error


def _check_class(values: Sequence[Any], wanted: type, kind: GGUFValueType) -> None:
    for value in values:
        if not isinstance(value, wanted):
            raise ContainerError(f"GGUF: {value!r:.80} cannot be stored as {kind.name}, only a {wanted.__name__} can")
