"""Text from a model directory, through the runtime it is made for: llama.cpp for GGUF, else transformers."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from pennyweight.core.errors import ModelError, UsageError
from pennyweight.evaluate.llama_cpp import continuation
from pennyweight.models import text
from pennyweight.models.gguf_files import first_file
from pennyweight.models.hub import resolve
from pennyweight.models.skeleton import read_config


def quiet_transformers() -> None:
    """Neither warnings nor bars of transformers on standard error; what matters is raised."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def generate(
    model: str,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    trust_remote_code: bool = False,
    is_streamed: bool = False,
) -> tuple[str, int, float]:
    """The continuation of `prompt`, its number of tokens, and the seconds it took without loading.

    With `is_streamed` it is printed as it comes. llama.cpp runs on the processor, whatever the `device`. Raises
    ModelError, and MissingExtraError where llama.cpp is needed and not installed.
    """
    path = resolve(model, trust_remote_code=trust_remote_code)
    if any(path.glob("*.gguf")):
        parts = continuation(first_file(path), prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return _told(parts, is_streamed=is_streamed)
    return _by_transformers(
        path, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, device=device,
        trust_remote_code=trust_remote_code, is_streamed=is_streamed,
    )  # fmt: skip


def _told(parts: Iterator[str], *, is_streamed: bool) -> tuple[str, int, float]:
    """All of `parts`, their number, and the seconds from the first one on."""
    started, text, count = time.perf_counter(), "", 0
    for part in parts:
        started = started if count else time.perf_counter()
        text, count = text + part, count + 1
        if is_streamed:
            print(part, end="", flush=True)
    if is_streamed:
        print()
    return text, count, round(time.perf_counter() - started, 3)


def _by_transformers(
    path: Path,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    trust_remote_code: bool,
    is_streamed: bool,
) -> tuple[str, int, float]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, TextStreamer, set_seed

    quiet_transformers()

    config = read_config(path, trust_remote_code=trust_remote_code)
    made_for = getattr(transformers, (config.architectures or [""])[0], None)
    if made_for is not None and not made_for.can_generate():
        raise ModelError(f"{path} is a {made_for.__name__}, which cannot continue a text: give a language model")
    tokenizer = text.load_tokenizer(path, trust_remote_code=trust_remote_code)
    try:
        # compressed-tensors draws its bars whatever it is told, here and in the first pass; what is wrong is raised.
        with redirect_stderr(StringIO()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", local_files_only=True, trust_remote_code=trust_remote_code
            )
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be run: {str(error).splitlines()[0]}") from error
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    if ids.shape[1] == 0:
        raise UsageError("--prompt is empty: give some text to continue")
    set_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if is_streamed else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    started = time.perf_counter()
    with torch.no_grad(), redirect_stderr(StringIO()):
        out = loaded.to(device).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    new = out[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new), round(time.perf_counter() - started, 3)
