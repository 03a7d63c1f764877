"""`pennyweight imatrix`: how large each weight's inputs are, for llama.cpp's own quantizer."""

from __future__ import annotations

from typing import Annotated

import typer

from pennyweight.cli import options as shared
from pennyweight.cli.console import Bar, device_of, put_json, set_jobs

_Out = Annotated[str, typer.Option(help="File to write; must be new.")]
_Calibration = Annotated[
    str | None,
    typer.Option(help="Text file, .jsonl, directory, built-in or self (the model writes it).  [default: built-in]"),
]
_Legacy = Annotated[bool, typer.Option("--legacy", help="Write the older format, .dat, in place of GGUF.")]


def imatrix(
    model: shared.Model,
    out: _Out,
    calibration: _Calibration = None,
    samples: shared.Samples = 128,
    length: shared.Length = 512,
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
    jobs: shared.Jobs = None,
    legacy: _Legacy = False,
    trust_remote_code: shared.Trust = False,
    as_json: shared.Json = False,
) -> None:
    """Write an importance matrix for llama.cpp.

    For `llama-quantize --imatrix`, and for `pennyweight quantize --importance`.
    """
    from pennyweight.pipeline.imatrix import imatrix as job

    set_jobs(jobs)
    report = job(
        model, out, calibration=calibration, samples=samples, length=length, seed=seed, device=device_of(device),
        trust_remote_code=trust_remote_code, legacy=legacy, tell=Bar("blocks").show,
    )  # fmt: skip
    if as_json:
        put_json(report)
        return
    print(f"{report.out}: {report.entries} weights, from {report.windows} windows of {report.length} tokens")
    if report.unseen:
        print(f"  {len(report.unseen)} experts saw no token, the first of them {report.unseen[0]}")
