"""GGUF files written number by number, whole and damaged, without the code under test."""

from __future__ import annotations

import struct
from collections.abc import Sequence

UINT16, UINT32, INT32, STRING, ARRAY = 2, 4, 5, 8, 9
F32, Q8_0 = 0, 8


def text(raw: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def field(key: bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def tensor(name: bytes, dims: Sequence[int], kind: int = F32, offset: int = 0, *, count: int | None = None) -> bytes:
    """`dims` in the file's order, the innermost first."""
    ndim = len(dims) if count is None else count
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", ndim, *dims, kind, offset)


def gguf(
    fields: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; `counts` (tensors, fields) is what it says in place of the truth."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(fields))))
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


SOUND = gguf(
    [
        field(b"general.architecture", STRING, text(b"llama")),
        field(b"n", UINT32, u32(7)),
        field(b"tokens", ARRAY, array(STRING, 3, text(b"a") + text(b"") + text("é".encode()))),
        field(b"sizes", ARRAY, array(UINT16, 2, b"\1\0\2\0")),
    ],
    [tensor(b"a", [3, 2], F32, 0), tensor(b"b", [32, 1, 2], Q8_0, 32)],
    bytes(range(32)) + bytes(range(68)) + bytes(28),
)
