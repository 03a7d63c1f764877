"""`pennyweight convert`: another container, the same codes."""

from __future__ import annotations

from typing import Annotated

import typer

from pennyweight.cli import options as shared
from pennyweight.cli.console import Bar, mebibytes, put_json, set_jobs

_Artefact = Annotated[str, typer.Argument(help="Directory of a model that is quantized: compressed-tensors or GGUF.")]
_Out = Annotated[str, typer.Option(help="Directory to write; must be new or empty.")]
_For = Annotated[str, typer.Option("--for", help="What will read the result: llama.cpp, transformers or vllm.")]
_AllowFloat = Annotated[
    bool, typer.Option("--allow-float", help="Keep weights in float whose codes the container cannot hold exactly.")
]
_Verify = Annotated[str, typer.Option(help="How the result is checked in its runtime: full, blocks or none.")]
# Weights kept in float that are named; the record has all.
_NAMED = 10


def convert(
    artefact: _Artefact,
    out: _Out,
    runtime: _For,
    allow_float: _AllowFloat = False,
    jobs: shared.Jobs = None,
    verify: _Verify = "full",
    trust_remote_code: shared.Trust = False,
    as_json: shared.Json = False,
) -> None:
    """Copy the codes of an artefact into another container.

    Nothing is rounded again: codes and scales are stored in another way where that holds the same numbers exactly, and
    what the container cannot hold is named.
    """
    from pennyweight.core.errors import UsageError
    from pennyweight.evaluate.converted import convert as job

    if verify not in ("full", "blocks", "none"):
        raise UsageError(f"--verify {verify}: give full, blocks or none")
    set_jobs(jobs)
    report = job(
        artefact, out, runtime=runtime, allow_float=allow_float, trust_remote_code=trust_remote_code,
        verification=verify, tell=Bar("weights").show,  # type: ignore[arg-type]
    )  # fmt: skip
    if as_json:
        put_json(report)
        return
    print(f"{report.out}: {mebibytes(report.size_bytes)}, {report.bpw:.2f} bits a weight over all tensors")
    stored = sorted(set(report.changed.values()))
    print(f"  {report.sites} weights with their codes, at {report.bpw_sites:.3f} bits, scales included")
    for said in stored:
        print(f"  {sum(text == said for text in report.changed.values())} of them: {said}")
    for name, reason in list(report.kept.items())[:_NAMED]:
        print(f"  kept in float: {name}: {reason}")
    if len(report.kept) > _NAMED:
        print(f"  ... and {len(report.kept) - _NAMED} more, all in pennyweight.json")
    print(f"  {report.seconds:.0f} s; verified: {report.verified}")
