"""Text from a model directory: llama.cpp runs GGUF, `pennyweight.load` packed weights, and transformers all else."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, Literal, get_args

from pennyweight.core.errors import ModelError, UsageError, first_line
from pennyweight.evaluate.llama_cpp import continuation
from pennyweight.kernels.packed import Activations
from pennyweight.models import text
from pennyweight.models.config_json import read_config_json
from pennyweight.models.gguf_files import first_file
from pennyweight.models.hub import resolve
from pennyweight.models.skeleton import read_config

# "auto": packed weights are multiplied with as they are, on the processor; "transformers" decodes them.
Runtime = Literal["auto", "transformers"]
# Kinds of quantization whose codes are multiplied with as they are.
_PACKED = ("compressed-tensors", "gptq", "awq")


def quiet_transformers() -> None:
    """Neither warnings nor bars of transformers on standard error; what matters is raised."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_runtime(runtime: str) -> Runtime:
    """Raises UsageError for one that does not exist."""
    if runtime not in get_args(Runtime):
        raise UsageError(f"runtime={runtime!r}: give 'auto' or 'transformers'")
    return runtime  # type: ignore[return-value]


def generate(
    model: str,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    runtime: Runtime = "auto",
    activations: Activations = "int8",
    trust_remote_code: bool = False,
    is_streamed: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[str, int, float]:
    """The continuation of `prompt`, its number of tokens, and the seconds it took without loading.

    With `is_streamed` it is printed as it comes; `tell` gets what is worth knowing beside. llama.cpp runs on the
    processor, whatever the `device`. Raises ModelError, UsageError for a runtime that does not exist, and
    MissingExtraError where llama.cpp is needed and not installed.
    """
    check_runtime(runtime)
    path = resolve(model, trust_remote_code=trust_remote_code)
    if any(path.glob("*.gguf")):
        parts = continuation(first_file(path), prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return _told(parts, is_streamed=is_streamed)
    quiet_transformers()
    check_continues(path, trust_remote_code=trust_remote_code)
    tokenizer = text.load_tokenizer(path, trust_remote_code=trust_remote_code)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise UsageError("--prompt is empty: give some text to continue")
    if runtime == "auto" and device == "cpu" and is_packed(path):
        return _by_packed_weights(
            path, tokenizer, ids, max_tokens=max_tokens, temperature=temperature, seed=seed, activations=activations,
            trust_remote_code=trust_remote_code, is_streamed=is_streamed, tell=tell,
        )  # fmt: skip
    return _by_transformers(
        path, tokenizer, ids.to(device), max_tokens=max_tokens, temperature=temperature, seed=seed,
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


def check_continues(path: Path, *, trust_remote_code: bool) -> None:
    """Raises ModelError for a model that is none of language."""
    import transformers

    config = read_config(path, trust_remote_code=trust_remote_code)
    made_for = getattr(transformers, (config.architectures or [""])[0], None)
    if made_for is not None and not made_for.can_generate():
        raise ModelError(f"{path} is a {made_for.__name__}, which cannot continue a text: give a language model")


def is_packed(path: Path) -> bool:
    """Whether its weights are multiplied with as they are packed."""
    settings = read_config_json(path).get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") in _PACKED


def _by_packed_weights(
    path: Path,
    tokenizer: Any,
    ids: Any,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    activations: Activations,
    trust_remote_code: bool,
    is_streamed: bool,
    tell: Callable[[str], None],
) -> tuple[str, int, float]:
    import torch
    from transformers import TextStreamer

    from pennyweight.inference.generate import stream
    from pennyweight.inference.load import load

    model = load(path, activations=activations, trust_remote_code=trust_remote_code)
    for line in model.load_report.lines():
        tell(line)
    streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True) if is_streamed else None
    if streamer is not None:
        streamer.put(ids)
    new: list[int] = []
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    for token in stream(model, ids, max_tokens=max_tokens, temperature=temperature, generator=generator):
        new.append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
    if streamer is not None:
        streamer.end()
    seconds = round(time.perf_counter() - started, 3)
    return tokenizer.decode(new, skip_special_tokens=True), len(new), seconds


def _by_transformers(
    path: Path,
    tokenizer: Any,
    ids: Any,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    trust_remote_code: bool,
    is_streamed: bool,
) -> tuple[str, int, float]:
    import torch
    from transformers import TextStreamer, set_seed

    loaded = load_in_transformers(path, trust_remote_code=trust_remote_code)
    set_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if is_streamed else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    started = time.perf_counter()
    with torch.no_grad(), redirect_stderr(StringIO()):
        out = loaded.to(ids.device).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    new = out[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new), round(time.perf_counter() - started, 3)


def load_in_transformers(path: Path, *, trust_remote_code: bool) -> Any:
    """transformers' own model of the directory, in its own type; raises ModelError where it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    try:
        # compressed-tensors draws its bars whatever it is told, here and in the first pass; what is wrong is raised.
        with redirect_stderr(StringIO()):
            return AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", local_files_only=True, trust_remote_code=trust_remote_code
            )
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be run: {first_line(error)}") from error
