"""A contestant of benchmarks.model: loads its model, then writes text whenever it is told to.

    python -m benchmarks.model_contestants ours|exact|generate|llama.cpp MODEL --threads 2 --context 576

It says when it has loaded, one JSON line, and answers each line {"prompt": tokens, "decode": tokens} on stdin with the
seconds of both and its resident memory. Text is written greedily, and nothing ends it. `read` takes no model: it
answers with the bytes a second of a streaming read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# prompt, decode -> when the first token was there, and when the last one was
Write = Callable[[int, int], tuple[float, float]]
PEER = "llama.cpp"
_READ_BYTES, _FIRST_TOKEN, _KILOBYTE = 512 << 20, 100, 1024


def open_ours(model: Path, activations: str) -> tuple[Write, dict[str, Any]]:
    """Our loop, as `pennyweight run` has it."""
    import torch

    import pennyweight as pw

    loaded = pw.load(model, activations=activations)
    loaded.generation_config.eos_token_id = None

    def write(prompt: int, decode: int) -> tuple[float, float]:
        from pennyweight.inference.generate import stream

        ids = torch.arange(_FIRST_TOKEN, _FIRST_TOKEN + prompt).unsqueeze(0)
        return _first_and_last(stream(loaded, ids, max_tokens=decode + 1, temperature=0))

    return write, _cache_facts(loaded)


def open_generate(model: Path) -> tuple[Write, dict[str, Any]]:
    """The same model through transformers' own loop."""
    import torch

    import pennyweight as pw

    loaded = pw.load(model, activations="int8")
    loaded.generation_config.eos_token_id = None

    def write(prompt: int, decode: int) -> tuple[float, float]:
        ids = torch.arange(_FIRST_TOKEN, _FIRST_TOKEN + prompt).unsqueeze(0)
        clock = _Clock()
        loaded.generate(ids, max_new_tokens=decode + 1, do_sample=False, streamer=clock)
        # It is given the prompt too.
        return clock.times[1], clock.times[-1]

    return write, _cache_facts(loaded)


class _Clock:
    """A streamer that keeps the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _cache_facts(loaded: Any) -> dict[str, Any]:
    report = loaded.load_report
    return {"packed_bytes": report.packed_bytes, "cache_bytes": report.cache_bytes, "is_fresh": report.is_fresh}


def open_llama(model: Path, threads: int, context: int) -> tuple[Write, dict[str, Any]]:
    """llama.cpp by its C interface, with its defaults: weights repacked, a float16 cache."""
    import llama_cpp
    import numpy as np

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    asked = llama_cpp.llama_context_default_params()
    asked.n_ctx, asked.n_threads, asked.n_threads_batch = context, threads, threads
    state = llama_cpp.llama_init_from_model(loaded, asked)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))

    def chosen(tokens: list[int]) -> int:
        given = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(state, llama_cpp.llama_batch_get_one(given, len(tokens))):
            raise RuntimeError(f"llama_decode failed at {len(tokens)} tokens")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(state, -1), (vocabulary,)).argmax())

    def tokens(prompt: int, decode: int) -> Iterator[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(state), True)
        token = chosen(list(range(_FIRST_TOKEN, _FIRST_TOKEN + prompt)))
        yield token
        for _ in range(decode):
            token = chosen([token])
            yield token

    return lambda prompt, decode: _first_and_last(tokens(prompt, decode)), {}


def _first_and_last(tokens: Iterator[int]) -> tuple[float, float]:
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first, time.perf_counter()


def open_read(threads: int) -> Callable[[], float]:
    """Bytes a second of a streaming read."""
    import torch

    from pennyweight.kernels.native import kernel_table, native

    memory = torch.ones(_READ_BYTES, dtype=torch.uint8)
    library = native()

    def read() -> float:
        start = time.perf_counter()
        if library is None:
            memory.view(torch.int64).sum()
        else:
            library.read_memory(memory, threads, kernel_table())
        return _READ_BYTES / (time.perf_counter() - start)

    return read


def memory_facts() -> dict[str, int]:
    """Bytes resident now, those of files among them, and the most there ever were (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM", "RssFile"))}
    return {
        "resident_bytes": int(found["VmRSS"]) * _KILOBYTE,
        "of_files_bytes": int(found["RssFile"]) * _KILOBYTE,
        "peak_bytes": int(found["VmHWM"]) * _KILOBYTE,
    }


def _opened(arguments: argparse.Namespace) -> tuple[Write, dict[str, Any]]:
    if arguments.kind == PEER:
        return open_llama(arguments.model, arguments.threads, arguments.context)
    if arguments.kind == "generate":
        return open_generate(arguments.model)
    return open_ours(arguments.model, "exact" if arguments.kind == "exact" else "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("ours", "exact", "generate", PEER, "read"))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    arguments = parser.parse_args()
    # What libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    imported = time.perf_counter()
    if arguments.kind == PEER:
        import llama_cpp  # noqa: F401
    else:
        import torch
        import transformers  # noqa: F401

        torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    read = open_read(arguments.threads) if arguments.kind == "read" else None
    write, facts = _opened(arguments) if read is None else (None, {})
    said = {"load_s": time.perf_counter() - start, "import_s": start - imported, **facts, **memory_facts()}
    print(json.dumps(said), file=answers)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            asked = json.loads(line)
            if read is not None:
                answer = {"bytes_per_s": read()}
            else:
                start = time.perf_counter()
                first, last = write(asked["prompt"], asked["decode"])
                answer = {"prompt_s": first - start, "decode_s": last - first, **memory_facts()}
            print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
