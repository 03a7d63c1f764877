"""GGUF files in llama.cpp, opened to be measured. Imports nothing of torch: memory is measured too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pennyweight.core.errors import ModelError, require
from pennyweight.evaluate.speed.base import Asked

# What the context has beyond the tokens that are asked for.
_SPARE = 8


class OpenedLlama:
    """A GGUF file with llama.cpp's own settings, whose texts nothing ends."""

    def __init__(self, file: Path, asked: Asked) -> None:
        package: Any = require("llama_cpp", extra="llama-cpp")
        self.facts: dict[str, Any] = {}
        self._file = file
        try:
            self._loaded = package.Llama(
                str(file), n_ctx=asked.context + _SPARE, n_threads=asked.threads, n_threads_batch=asked.threads,
                verbose=False,
            )  # fmt: skip
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ModelError(f"{file}: llama.cpp cannot load it: {error}") from error

    def write(self, prompt: int, tokens: int) -> Iterator[int]:
        """`tokens` tokens, each the most likely one, after a prompt of `prompt` random ones."""
        ids = random.Random(0).choices(range(self._loaded.n_vocab()), k=prompt)
        # Or it would find the prompt of the last time.
        self._loaded.reset()
        return islice(self._loaded.generate(ids, temp=0.0), tokens)

    def touch(self) -> None:
        """llama.cpp has read all weights once it has written, but for rows of its table of tokens."""

    def bytes_per_token(self) -> int:
        from pennyweight.evaluate.speed.read_bytes import gguf_bytes_per_token

        return gguf_bytes_per_token(self._file)
