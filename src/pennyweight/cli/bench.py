"""`pennyweight bench`: how fast does it write, and in how much memory?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from pennyweight.cli import options as shared
from pennyweight.cli.console import Bar, mebibytes, put_json, say, table

if TYPE_CHECKING:
    from pennyweight.evaluate.speed.results import Bench, Contestant, Spread


def bench(
    artefact: str = typer.Argument(help="Model directory, or GGUF file."),
    against: str | None = typer.Option(None, help="The original or another model, measured in turns with it."),
    prompt_tokens: int | None = typer.Option(
        None, min=1, help="Of random tokens.  [default: 512, or what the context leaves]"
    ),
    tokens: int = typer.Option(64, min=1, help="Written after the first one."),
    threads: int | None = typer.Option(None, min=1, help="[default: all cores]"),
    activations: str = typer.Option("int8", help="What packed weights are multiplied with: int8 or exact."),
    runtime: str = typer.Option("auto", help="auto, or transformers, which decodes packed weights."),
    rounds: int = typer.Option(3, min=1, help="Of each model; medians are shown, with the lowest and highest."),
    trust_remote_code: shared.Trust = False,
    as_json: shared.Json = False,
) -> None:
    """Speed, memory, and how near to what memory allows.

    Each model has a process of its own on the processor, run as `run` runs it. Memory is read before and after each
    text, with as many threads: the share is what decoding reads of weights a second, of that.
    """
    from pennyweight.evaluate.generate import check_runtime
    from pennyweight.evaluate.speed.bench import bench as measure
    from pennyweight.inference.operator import check_activations

    found = measure(
        artefact, against=against, prompt_tokens=prompt_tokens, tokens=tokens, threads=threads,
        activations=check_activations(activations), runtime=check_runtime(runtime), rounds=rounds,
        trust_remote_code=trust_remote_code, tell=Bar("rounds").show,
    )  # fmt: skip
    put_json(found) if as_json else _print(found)


# What a row shows -> its text of a model; where both models have a ratio, its name.
_ROWS: tuple[tuple[str, Callable[[Contestant], str], str | None], ...] = (
    ("runtime", lambda one: _runtime(one), None),
    ("prompt, tokens a second", lambda one: _spread(one.prompt_tokens_per_s), "prompt_tokens_per_s"),
    ("decoding, tokens a second", lambda one: _spread(one.decode_tokens_per_s), "decode_tokens_per_s"),
    ("seconds to the first token", lambda one: _spread(one.first_token_s), None),
    ("  from a cold start", lambda one: f"{one.cold_first_token_s:.3g}", "cold_first_token_s"),
    ("seconds to load", lambda one: f"{one.load_s:.3g}", "load_s"),
    ("  the first time, packing", lambda one: _known(one.first_load_s, lambda s: f"{s:.3g}"), None),
    ("files", lambda one: mebibytes(one.size_bytes), "size_bytes"),
    ("  packed weights, kept", lambda one: mebibytes(one.cache_bytes) if one.cache else "-", None),
    ("resident memory", lambda one: _known(one.resident_bytes, mebibytes), "resident_bytes"),
    ("  mapped from files", lambda one: _known(one.mapped_bytes, mebibytes), None),
    ("  libraries, before loading", lambda one: _known(one.libraries_bytes, mebibytes), None),
    ("peak memory", lambda one: mebibytes(one.peak_bytes), "peak_bytes"),
    ("weights read a token", lambda one: mebibytes(one.bytes_per_token), "bytes_per_token"),
    ("  decoding, GB a second", lambda one: _spread(one.decode_bytes_per_s, 1e-9), None),
    ("  % of reading memory", lambda one: _spread(one.share, 100), None),
)


def _print(found: Bench) -> None:
    models = [found.artefact] if found.against is None else [found.artefact, found.against]
    turns = ", interleaved" if found.is_interleaved else ""
    print(f"rounds: {found.rounds}{turns}; tokens: {found.prompt_tokens} of a prompt, {found.tokens} after the first "
          f"one; threads: {found.threads}")  # fmt: skip
    ratios = found.ratios
    rows = [[name, *(text(one) for one in models)] for name, text, _ in _ROWS]
    header = ["", *(one.model for one in models)]
    if ratios is not None:
        header.append("ratio")
        for row, (_, _, name) in zip(rows, _ROWS, strict=True):
            row.append(f"{ratios[name]:.3g} x" if name is not None and name in ratios else "")
    table(header, [row for row in rows if set(row[1:]) - {"-", ""}])
    print(f"reading {mebibytes(found.read_bytes)} of memory: {_spread(found.read_bytes_per_s, 1e-9)} GB a second")
    for one in models:
        _print_model(one)
    if found.load_average is not None:
        print(f"load average before: {', '.join(f'{value:.2f}' for value in found.load_average)}")
    for line in found.notices:
        say(f"note: {line}")


def _print_model(found: Contestant) -> None:
    if found.rounding:
        errors = ", ".join(f"{100 * error:.2f} % in groups of {group}" for group, error in found.rounding.items())
        print(f"{found.model}: int8 changes normally distributed inputs by {errors}")
    if found.cache:
        print(f"{found.model}: packed weights are kept in {found.cache}")
    for name, why in found.decoded.items():
        print(f"{found.model}: kept as floats: {name}: {why}")


def _runtime(found: Contestant) -> str:
    if found.runtime != "packed":
        return found.runtime
    return f"packed, {found.activations}, {found.kernels or 'torch'}"


def _known(value: float | int | None, text: Callable[..., str]) -> str:
    return "-" if value is None else text(value)


def _spread(found: Spread, unit: float = 1.0) -> str:
    low, middle, high = (_number(unit * value) for value in (found.lowest, found.median, found.highest))
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    """Three digits, more of whole numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
