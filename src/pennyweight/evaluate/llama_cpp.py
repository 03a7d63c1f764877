"""llama.cpp through llama-cpp-python: logits and token ids of a GGUF file."""

from __future__ import annotations

import codecs
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import ModelError, UsageError, VerificationError, require
from pennyweight.core.parallel import allowed_threads

PACKAGE = "llama_cpp"
EXTRA = "llama-cpp"
INSTALL = f"pip install 'pennyweight[{EXTRA}]'"
# ggml's number of float32: keys and values are kept as exactly as our own evaluation has them.
_FLOAT32 = 0


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


class Llama:
    """A GGUF file in llama.cpp, on the CPU, with a float32 cache."""

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded

    def logits(self, ids: Tensor) -> Tensor:
        """float32 [windows, tokens, vocabulary] of token ids [windows, tokens]."""
        found = []
        for window in ids.tolist():
            self._loaded.reset()
            self._loaded.eval(window)
            found.append(torch.tensor(self._loaded.scores[: len(window)]))
        return torch.stack(found)

    def tokens(self, text: str) -> list[int]:
        """Its token ids of `text`, without any that mark its beginning or end."""
        return list(self._loaded.tokenize(text.encode(), add_bos=False, special=False))

    def continued(self, ids: list[int], count: int) -> list[int]:
        """`count` more tokens, each the most likely one."""
        self._loaded.reset()
        made: list[int] = []
        for token in self._loaded.generate(ids, temp=0.0):
            made.append(int(token))
            if len(made) == count:
                break
        return made


def continuation(file: Path, prompt: str, *, max_tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """The text of each token by which llama.cpp continues `prompt`, empty where it is part of a letter.

    A `temperature` of 0 takes the most likely token each time. Ends where the model ends the text.

    Raises MissingExtraError without llama-cpp-python, ModelError where llama.cpp refuses the file, UsageError for an
    empty prompt.
    """
    package: Any = require(PACKAGE, extra=EXTRA)
    threads = allowed_threads()
    # A token is a byte at least, but for those that mark a beginning or an end.
    context = len(prompt.encode()) + max_tokens + 8
    try:
        loaded = package.Llama(
            str(file), n_ctx=context, n_threads=threads, n_threads_batch=threads, seed=seed, verbose=False
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{file}: llama.cpp cannot load it: {error}") from error
    letters = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        seen = loaded.tokenize(prompt.encode(), special=True)
        if not seen:
            raise UsageError("--prompt is empty: give some text to continue")
        sampling = {"temp": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        for token in islice(loaded.generate(seen, **sampling), max_tokens):
            if package.llama_vocab_is_eog(loaded._model.vocab, token):
                return
            yield letters.decode(loaded.detokenize([token], prev_tokens=seen))
            seen = [*seen, token]
    finally:
        loaded.close()


@contextmanager
def opened(file: Path, *, context: int) -> Iterator[Llama]:
    """`file` loaded for windows of at most `context` tokens; raises VerificationError where llama.cpp refuses it."""
    package: Any = importlib.import_module(PACKAGE)
    try:
        loaded = package.Llama(
            str(file), n_ctx=context, n_batch=context, n_threads=allowed_threads(), n_threads_batch=allowed_threads(),
            logits_all=True, type_k=_FLOAT32, type_v=_FLOAT32, verbose=False,
        )  # fmt: skip
    except (ValueError, RuntimeError, AssertionError) as error:
        raise VerificationError(f"{file}: llama.cpp cannot load it: {error}") from error
    try:
        yield Llama(loaded)
    finally:
        loaded.close()
