"""`pennyweight verify`: does its runtime open it, and compute what we mean?"""

from __future__ import annotations

from pathlib import Path

import typer

from pennyweight.cli.console import put_json


def verify(
    artefact: str = typer.Argument(help="Directory that `quantize` or `convert` wrote."),
    extent: str = typer.Option("full", help="full: load the whole model and compare logits; blocks: weight by weight."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Run code that the model brings along."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Check that the runtime reads what was meant.

    The files must be the ones that pennyweight.json lists. In a fresh process transformers opens them, or llama.cpp a
    GGUF file, and what it computes is compared with our own decoding.
    """
    from pennyweight.core.errors import UsageError
    from pennyweight.evaluate.verify import verify as check

    if extent not in ("full", "blocks"):
        raise UsageError(f"--extent {extent}: give full or blocks")
    found = check(Path(artefact), extent=extent, trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
    if as_json:
        put_json(found)
        return
    for key, value in found.items():
        print(f"{key.replace('_', ' ')}: {value}")
