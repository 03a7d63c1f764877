"""Text from a model directory, through transformers."""

from __future__ import annotations

import time
from typing import Any

from pennyweight.core.errors import ModelError, UsageError
from pennyweight.models import text
from pennyweight.models.hub import resolve
from pennyweight.models.skeleton import read_config


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
    """The continuation of `prompt`, its number of tokens, and the seconds it took without loading."""
    import torch
    from transformers import AutoModelForCausalLM, TextStreamer, set_seed
    from transformers.utils import logging

    path = resolve(model, trust_remote_code=trust_remote_code)
    read_config(path, trust_remote_code=trust_remote_code)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = text.load_tokenizer(path, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError) as error:
        raise ModelError(f"{model} cannot be run: {str(error).splitlines()[0]}") from error
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    if ids.shape[1] == 0:
        raise UsageError("--prompt is empty: give some text to continue")
    set_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if is_streamed else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    started = time.perf_counter()
    with torch.no_grad():
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
