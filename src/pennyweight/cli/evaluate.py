"""`pennyweight evaluate`: what a smaller model lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from pennyweight.cli.console import Bar, device_of, mebibytes, put_json, set_jobs

if TYPE_CHECKING:
    from pennyweight.evaluate.compare import Evaluation


def evaluate(
    artefact: str = typer.Argument(help="Directory of the smaller model."),
    against: str = typer.Option(..., help="The original: directory or Hub id."),
    text: str = typer.Option(..., help="Text file, .jsonl or directory that neither was calibrated on."),
    length: int = typer.Option(512, min=4, help="Tokens a window; the stride is the same."),
    samples: int | None = typer.Option(None, min=1, help="Windows at most, from the start.  [default: all]"),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    jobs: int | None = typer.Option(None, min=1, help="Threads.  [default: all cores]"),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Run code that the model brings along."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Perplexity, KL and agreement with the original.

    Standard errors are over windows. Both models are run block by block.
    """
    from pennyweight.evaluate.compare import evaluate as compare

    set_jobs(jobs)
    bar = Bar("blocks")
    found = compare(
        artefact,
        against=against,
        source=text,
        length=length,
        samples=samples,
        device=device_of(device),
        trust_remote_code=trust_remote_code,
        tell=bar.show,
    )
    put_json(found) if as_json else _print(found)


def _print(found: Evaluation) -> None:
    print(f"{found.tokens} tokens in {found.windows} windows of {found.context}, stride {found.stride}")
    if found.kl_mean is not None:
        print(f"  perplexity      {found.perplexity:.4g}, original {found.reference_perplexity:.4g}")
        print(f"  KL to original  {found.kl_mean:.4g} nats a token, standard error {found.kl_stderr:.2g}")
        print(f"  same top token  {100 * (found.top1_agreement or 0):.2f} %")
    else:
        print(f"  cosine of embeddings  {found.cosine_mean:.6f}, standard error {found.cosine_stderr:.2g}")
    print(f"  size            {mebibytes(found.size_bytes)}, original {mebibytes(found.reference_size_bytes)}")
    print(f"  bits a weight   {found.bpw:.3f}, original {found.reference_bpw:.3f}")
