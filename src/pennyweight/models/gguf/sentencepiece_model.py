"""tokenizer.model: a SentencePiece model, a message of protocol buffers.

    ModelProto       1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec
    SentencePiece    1 piece, 2 score (float32), 3 type
    TrainerSpec      3 model_type: 1 unigram, 2 BPE
    NormalizerSpec   2 precompiled_charsmap

https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf

from pennyweight.core.errors import ContainerError, ModelError

_BPE = 2
# GGUF took over SentencePiece's numbers. Pieces that a user defined count as normal ones unless a tokenizer's other
# files name them, as for transformers.
_USER_DEFINED = gguf.TokenType.USER_DEFINED


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: gguf.TokenType


def read_pieces(file: Path) -> list[Piece]:
    """All pieces in order of id; raises ModelError for a damaged file and ContainerError where llama.cpp would cut
    text in another way."""
    try:
        message = list(_fields(file.read_bytes()))
        pieces = [_piece(value) for number, value in message if number == 1 and isinstance(value, bytes)]
        trainer = dict(found for n, value in message if n == 2 and isinstance(value, bytes) for found in _fields(value))
        normalizer = dict(
            found for n, value in message if n == 3 and isinstance(value, bytes) for found in _fields(value)
        )
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ModelError(f"{file}: can't be read as a SentencePiece model ({error}): download it again") from error
    if not pieces:
        raise ModelError(f"{file}: holds no pieces: download it again")
    if trainer.get(3, 1) != _BPE:
        raise ContainerError(f"{file}: is not a BPE model, the only kind that is known: choose another container")
    if normalizer.get(2):
        raise ContainerError(f"{file}: normalizes text, which llama.cpp does not: choose another container")
    return pieces


def _piece(message: bytes) -> Piece:
    values = dict(_fields(message))
    text, score = values[1], values.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece of another form")
    kind = gguf.TokenType(int(values.get(3, gguf.TokenType.NORMAL)))
    kind = gguf.TokenType.NORMAL if kind is _USER_DEFINED else kind
    return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an integer (wire type 0), or bytes (1, 2, 5)."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if kind == 2:
            length, place = _varint(message, place)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if place + length > len(message):
            raise ValueError("it ends too early")
        yield key >> 3, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
