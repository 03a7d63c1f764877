"""What a process of `bench` is asked for, and what it measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Kind = Literal["packed", "transformers", "llama.cpp", "memory"]


@dataclass(frozen=True)
class Asked:
    """threads; context, tokens at most; of packed weights, what they are multiplied with; bytes, of memory to read."""

    threads: int
    context: int = 0
    activations: Any = "int8"
    trust_remote_code: bool = False
    bytes: int = 0


class Opened(Protocol):
    """A model that can be measured; `facts` are told to who asked for it."""

    facts: dict[str, Any]

    def write(self, prompt: int, tokens: int) -> Iterator[int]: ...
    def touch(self) -> None: ...
    def bytes_per_token(self) -> int: ...
