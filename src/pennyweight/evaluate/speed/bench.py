"""`pennyweight.bench`: how fast a model writes, beside another one, and how near to what memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from pennyweight.core.errors import UsageError
from pennyweight.core.parallel import allowed_threads
from pennyweight.evaluate.generate import Runtime, check_runtime
from pennyweight.evaluate.speed.base import Asked
from pennyweight.evaluate.speed.entry import Entry, entry_of
from pennyweight.evaluate.speed.machine import Watch, cache_bytes, load_average
from pennyweight.evaluate.speed.process import Process
from pennyweight.evaluate.speed.race import Racer, race, speed_ratios
from pennyweight.evaluate.speed.results import Bench, Contestant, spread_of
from pennyweight.inference.operator import check_activations
from pennyweight.kernels.packed import Activations

_PROMPT = 512
# The memory that is read is so many times larger than the caches; where those are not known, _MEMORY.
_TIMES_THE_CACHE, _LEAST_MEMORY, _MEMORY = 4, 256 << 20, 512 << 20
# What others may use of the processors before it is worth a word.
_QUIET = 0.1
# Beside speeds: of what a ratio says something.
_COMPARED = ("load_s", "cold_first_token_s", "size_bytes", "resident_bytes", "peak_bytes", "bytes_per_token")


def bench(
    artefact: str | Path,
    *,
    against: str | Path | None = None,
    prompt_tokens: int | None = None,
    tokens: int = 64,
    threads: int | None = None,
    activations: Activations = "int8",
    runtime: Runtime = "auto",
    rounds: int = 3,
    trust_remote_code: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Measure how fast `artefact` takes in a prompt and writes, on the processor; see docs/inference.md.

    against                another model, or the original, measured in turns with it
    prompt_tokens          512 by default, or what the context leaves; `tokens` are written after the first one
    threads                as many as torch uses by default; memory is read with as many
    activations, runtime   of both models, as `load` and `pennyweight run` take them
    tell                   is told after each of the rounds how many are done

    Each model has a process of its own, and both stay loaded. Raises ModelError for what is no language model,
    UsageError for settings that do not exist or a context that is too short, MissingExtraError for a GGUF file without
    llama-cpp-python.
    """
    _check(prompt_tokens=prompt_tokens, tokens=tokens, threads=threads, rounds=rounds)
    check_activations(activations)
    named = [artefact] if against is None else [artefact, against]
    entries = [entry_of(name, check_runtime(runtime), trust_remote_code=trust_remote_code) for name in named]
    prompt = _prompt(entries, prompt_tokens, tokens)
    asked = Asked(threads or allowed_threads(), prompt + tokens, activations, trust_remote_code)
    load, cache = load_average(), cache_bytes()
    read_bytes = _MEMORY if cache is None else max(_LEAST_MEMORY, _TIMES_THE_CACHE * cache)
    with ExitStack() as stack:
        racers = [Racer(stack, entry, asked, prompt=prompt, tokens=tokens) for entry in entries]
        memory = stack.enter_context(Process("memory", Path(), Asked(asked.threads, bytes=read_bytes)))
        processes = [memory, *(racer.process for racer in racers)]
        watch, before = Watch(), sum(process.cpu_s for process in processes)
        reads = race(racers, memory, rounds, tell)
        others = watch.others(sum(process.cpu_s for process in processes) - before)
        found = [racer.result() for racer in racers]
    return Bench(
        rounds=rounds, prompt_tokens=prompt, tokens=tokens, threads=asked.threads, is_interleaved=len(found) > 1,
        load_average=load, others_share=others, cache_bytes=cache, read_bytes=read_bytes,
        read_bytes_per_s=spread_of(reads), artefact=found[0], against=found[1] if len(found) > 1 else None,
        ratios=_ratios(*found) | speed_ratios(*racers) if len(found) > 1 else None,
        notices=[*_of_machine(others), *(line for one in found for line in _of_model(one, cache))],
    )  # fmt: skip


def _check(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name}={count}: give 1 or more")


def _prompt(entries: Sequence[Entry], asked: int | None, tokens: int) -> int:
    """Tokens of the prompt; raises UsageError where a context does not hold them and the `tokens` after them."""
    least = asked or 1
    for entry in entries:
        if entry.context is not None and entry.context < least + tokens:
            raise UsageError(
                f"{entry.name}: its context has {entry.context} tokens, too few for {least} of a prompt and {tokens} "
                "after them: give fewer"
            )
    known = [entry.context - tokens for entry in entries if entry.context is not None]
    return asked or min([_PROMPT, *known])


def _ratios(ours: Contestant, theirs: Contestant) -> dict[str, float]:
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in _COMPARED}
    return {name: one / other for name, (one, other) in pairs.items() if one is not None and other}


def _of_machine(others: float | None) -> list[str]:
    if others is None or others <= _QUIET:
        return []
    return [f"others used {100 * others:.0f} % of the processors meanwhile: measure again when it is quiet"]


def _of_model(found: Contestant, cache: int | None) -> list[str]:
    said = [f"{found.model}: {note}" for note in found.notes]
    if found.runtime == "packed" and found.kernels is None:
        said.append(f"{found.model}: the native library is not used (not built, or PENNYWEIGHT_KERNELS=torch): "
                    "plain torch versions, which decode each weight, were measured")  # fmt: skip
    if cache is not None and found.bytes_per_token < cache:
        said.append(
            f"{found.model}: what a token reads fits in the processors' cache: its share says nothing of memory"
        )
    return said
