"""A process of `bench`: opens one model, or nothing but memory, and answers questions, one line of JSON each.

    python -m pennyweight.evaluate.speed.worker packed|transformers|llama.cpp|memory PATH ASKED

Its first line says what was opened, or {"error": [class, text]}. Then {"prompt": tokens, "tokens": tokens} is answered
with the seconds of both, {"read": passes} with bytes a second, and {"end": true} with its memory when all weights have
been read and with the bytes that a token reads. All else that is printed goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from pennyweight.core.errors import ModelError, PennyweightError, require
from pennyweight.evaluate.speed.base import Asked, Opened
from pennyweight.evaluate.speed.machine import memory_facts

# Modules of this folder, imported before the clock of loading starts.
_IMPORTS = {"packed": "opened", "transformers": "opened", "llama.cpp": "llama", "memory": "memory"}


def main(arguments: list[str]) -> None:
    kind, path, asked = arguments[0], Path(arguments[1]), Asked(**json.loads(arguments[2]))
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        answer, ready = _opened(kind, path, asked)
        _say(answers, ready)
        for line in sys.stdin:
            _say(answers, answer(json.loads(line)))
    except PennyweightError as error:
        _say(answers, {"error": [type(error).__name__, str(error)]})
    except KeyboardInterrupt:
        pass
    # Without taking apart what was imported, which takes seconds where processors are busy.
    os._exit(0)


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps({**answer, "cpu_s": time.process_time()}), file=answers)


def _opened(kind: str, path: Path, asked: Asked) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]:
    """What answers questions, and what is said first."""
    began = time.perf_counter()
    module = importlib.import_module(f"pennyweight.evaluate.speed.{_IMPORTS[kind]}")
    if kind == "llama.cpp":
        require("llama_cpp", extra="llama-cpp")
    imported, before = time.perf_counter(), memory_facts()["resident_bytes"]
    if kind == "memory":
        memory = module.Memory(asked.bytes, asked.threads)
        return lambda question: {"bytes_per_s": memory.read(question["read"])}, {}
    openers = {"packed": "open_packed", "transformers": "open_transformers", "llama.cpp": "OpenedLlama"}
    opened: Opened = getattr(module, openers[kind])(path, asked)
    seconds = {"import_s": imported - began, "load_s": time.perf_counter() - imported}
    ready = {**seconds, "libraries_bytes": before, "facts": opened.facts}
    return lambda question: _end(opened) if "end" in question else _burst(opened, **question), ready


def _burst(opened: Opened, prompt: int, tokens: int) -> dict[str, Any]:
    """Seconds to the first token, and from there through `tokens` more."""
    start = time.perf_counter()
    written = opened.write(prompt, tokens + 1)
    next(written)
    first = time.perf_counter()
    made = sum(1 for _ in written)
    last = time.perf_counter()
    if made != tokens:
        raise ModelError(f"the text ended after {made + 1} of {tokens + 1} tokens: it cannot be measured")
    return {"first_s": first - start, "decode_s": last - first}


def _end(opened: Opened) -> dict[str, Any]:
    opened.touch()
    return {**memory_facts(), "bytes_per_token": opened.bytes_per_token()}


if __name__ == "__main__":
    main(sys.argv[1:])
