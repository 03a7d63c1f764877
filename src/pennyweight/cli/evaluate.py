"""`pennyweight evaluate`: what a smaller model lost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pennyweight.cli.console import Bar, device_of, mebibytes, put_json, set_jobs

if TYPE_CHECKING:
    from pennyweight.evaluate.compare import Evaluation, Sizes
    from pennyweight.evaluate.tasks.evaluated import TaskEvaluation


def evaluate(
    artefact: str = typer.Argument(help="Directory of the smaller model."),
    against: str = typer.Option(..., help="The original: directory or Hub id."),
    text: str | None = typer.Option(None, help="Text file, .jsonl or directory that neither was calibrated on."),
    task: str | None = typer.Option(
        None, help="Items, JSON lines: multiple choice, cloze or sentence pairs.  [--text, --task or both]"
    ),
    length: int = typer.Option(512, min=4, help="Tokens a window of text, at most; the stride is the same."),
    samples: int | None = typer.Option(
        None, min=1, help="Windows, of an encoder texts, at most, from the start.  [default: all]"
    ),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    jobs: int | None = typer.Option(None, min=1, help="Threads.  [default: all cores]"),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Run code that the model brings along."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Perplexity, KL, agreement with the original; a task's metric.

    Standard errors are over windows, or over items. Both models are run block by block.
    """
    from pennyweight.core.errors import UsageError
    from pennyweight.evaluate.compare import evaluate as compare
    from pennyweight.evaluate.tasks.evaluated import evaluate_task

    if text is None and task is None:
        raise UsageError("there is nothing to evaluate on: give --text FILE, --task FILE or both")
    set_jobs(jobs)
    bar, place = Bar("blocks"), device_of(device)
    found = on_task = None
    if task is not None:
        on_task = evaluate_task(
            artefact, against=against, path=Path(task), device=place, trust_remote_code=trust_remote_code
        )
    if text is not None:
        found = compare(
            artefact, against=against, source=text, length=length, samples=samples, device=place,
            trust_remote_code=trust_remote_code, tell=bar.show,
        )  # fmt: skip
    put_json(_known(found, on_task)) if as_json else _print(found, on_task)


def _known(found: Evaluation | None, on_task: TaskEvaluation | None) -> dict[str, Any]:
    """What --json prints; sizes stand once."""
    known: dict[str, Any] = {} if found is None else asdict(found)
    if on_task is not None:
        of_task = asdict(on_task)
        known = {**of_task.pop("sizes"), **known, "task": of_task}
    return known


def _print(found: Evaluation | None, on_task: TaskEvaluation | None) -> None:
    if found is not None:
        _print_text(found)
    if on_task is not None:
        _print_task(on_task)
    sizes: Evaluation | Sizes | None = found if on_task is None else on_task.sizes
    assert sizes is not None
    print(f"  size            {mebibytes(sizes.size_bytes)}, original {mebibytes(sizes.reference_size_bytes)}")
    print(f"  bits a weight   {sizes.bpw:.3f}, original {sizes.reference_bpw:.3f}")


def _print_text(found: Evaluation) -> None:
    if found.kl_mean is not None:
        print(f"{found.tokens} tokens in {found.windows} windows of {found.context}, stride {found.stride}")
        print(f"  perplexity      {found.perplexity:.4g}, original {found.reference_perplexity:.4g}")
        print(f"  KL to original  {found.kl_mean:.4g} nats a token, standard error {found.kl_stderr:.2g}")
        print(f"  same top token  {100 * (found.top1_agreement or 0):.2f} %")
    else:
        print(f"{found.tokens} tokens in {found.windows} texts, or pieces of texts, of at most {found.context}")
        print(f"  cosine of embeddings  {found.cosine_mean:.6f}, standard error {found.cosine_stderr:.2g}")


def _print_task(found: TaskEvaluation) -> None:
    print(f"{found.items} items of {found.kind}, in points of 100")
    for name, value in found.metrics.items():
        print(f"  {name.replace('_', ', '):<22}{value:.2f}, original {found.reference[name]:.2f}")
    print(f"  lost                  {found.lost:.2f}, standard error {found.stderr:.2f}; "
          f"at most {found.upper:.2f} with 99 % confidence")  # fmt: skip
