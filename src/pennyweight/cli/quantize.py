"""`pennyweight quantize`: the main job."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

import typer

from pennyweight.cli.console import Bar, Clock, device_of, mebibytes, put_json, say, set_jobs
from pennyweight.core.memory import settle_imports

if TYPE_CHECKING:
    from collections.abc import Callable

    from pennyweight.pipeline.records import BlockDone, RunReport, SiteRecord, Tell
    from pennyweight.train.recover import Step


def quantize(
    model: str = typer.Argument(help="Model directory or Hugging Face Hub id."),
    out: str = typer.Option(..., help="Directory to write; must be new or empty."),
    scheme: str | None = typer.Option(
        None, help="Short name: int4-g128, int4-g32-asym, int8-channel...  [default: int4-g128]"
    ),
    bits: int | None = typer.Option(None, min=2, max=8, help="Instead of --scheme: this width in groups of 128."),
    runtime: str = typer.Option("transformers", "--for", help="What will read the result: transformers or vllm."),
    effort: str = typer.Option(
        "normal", help="fast, normal or best: what the run may cost, and so which of the next four steps it takes."
    ),
    rotate: bool = typer.Option(False, "--rotate", help="Rotate the residual stream first; a tied head is untied."),
    transform: str | None = typer.Option(None, help="How a block is rewritten before that: awq, or none."),
    solver: str | None = typer.Option(None, help="How the codes of one matrix are chosen: gptq, nearest..."),
    refine: str | None = typer.Option(None, help="How those of a block are refined together, or none."),
    recover: bool | None = typer.Option(
        None, "--recover/--no-recover", help="Train scales and norms end to end at last."
    ),
    loss_aware: bool = typer.Option(
        False, "--loss-aware/--no-loss-aware", help="Weigh tokens by how much the loss depends on them."
    ),
    fit: str = typer.Option("search", help="How scales are fitted: search or minmax."),
    calibration: str | None = typer.Option(
        None,
        help="Text file, .jsonl, directory, built-in, self or none.  [default: built-in, none for --solver nearest]",
    ),
    samples: int = typer.Option(128, min=1, help="Calibration windows at most."),
    length: int = typer.Option(512, min=4, help="Tokens a window."),
    seed: int = typer.Option(0, help="Which windows are drawn."),
    device: str = typer.Option("auto", help="auto, cpu or cuda."),
    jobs: int | None = typer.Option(
        None, min=1, help="Threads; the result does not depend on it.  [default: all cores]"
    ),
    verify: str = typer.Option("full", help="How the result is checked in its runtime: full, blocks or none."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Run code that the model brings along."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Quantize a model, and verify it in its runtime.

    After a crash or Ctrl-C the same command continues where it was.
    """
    from pennyweight.core.errors import UsageError

    gc.disable()
    from pennyweight.evaluate.proved import quantize as job

    if scheme and bits:
        raise UsageError(f"--scheme {scheme} and --bits {bits} exclude each other: give one")
    if verify not in ("full", "blocks", "none"):
        raise UsageError(f"--verify {verify}: give full, blocks or none")
    set_jobs(jobs)
    report = job(
        model,
        out,
        scheme=scheme or (f"int{bits}-g128" if bits else "int4-g128"),
        effort=effort,  # type: ignore[arg-type]
        rotate=rotate,
        transform=transform,
        solver=solver,
        refine=refine,
        recover=recover,
        loss_aware=loss_aware,
        fit=fit,  # type: ignore[arg-type]
        runtime=runtime,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        device=device_of(device),
        trust_remote_code=trust_remote_code,
        verification=verify,  # type: ignore[arg-type]
        tell=teller(),
        tell_step=step_teller(),
    )
    put_json(report) if as_json else _print(report)


def teller() -> Tell:
    """Shows each finished block: a line with the error of every site, and a bar on a terminal."""
    clock, bar = Clock(), Bar("blocks")

    def tell(done: BlockDone) -> None:
        if not gc.isenabled():
            settle_imports()
        if sys.stderr.isatty():
            print("\r" + " " * 78 + "\r", end="", file=sys.stderr)
        state = "  (from the earlier run)" if done.resumed else ""
        time = clock.line(done.index + 1, done.total)
        say(f"block {done.index + 1}/{done.total}: {_errors(done.sites)}  [{time}]{state}")
        for site in done.sites:
            for note in site.notes if len(done.sites) < 40 else ():
                say(f"  {site.name}: {note}")
        bar.show(done.index + 1, done.total)

    return tell


def step_teller() -> Callable[[Step], None]:
    """Shows the steps of recovery: a line wherever the held-out windows were asked, and a bar on a terminal."""
    started: list[Clock] = []
    bar = Bar("steps")

    def tell(step: Step) -> None:
        # Time counts from the first step on, not from the blocks before.
        clock = started[0] if started else Clock()
        started[:] = [clock]
        if step.held_out is not None:
            time = f"  [{clock.line(step.done, step.total)}]" if step.done else ""
            say(f"recovery, step {step.done}/{step.total}: held-out loss {step.held_out:.4g}{time}")
        bar.show(step.done, step.total)

    return tell


def _errors(sites: list[SiteRecord]) -> str:
    """Relative output error in per cent, and how many times that of rounding to nearest, for each kind of site."""
    kinds: dict[str, list[SiteRecord]] = {}
    for site in sites:
        kinds.setdefault(site.name.rsplit(".", 1)[-1], []).append(site)
    return ", ".join(_kind(name, group) for name, group in kinds.items())


def _kind(name: str, sites: list[SiteRecord]) -> str:
    error = sum(site.error for site in sites) / len(sites)
    nearest = sum(site.error_nearest for site in sites) / len(sites)
    ratio = f" ({error / nearest:.2f} x nearest)" if nearest and error != nearest else ""
    return f"{name} {100 * error:.2g} %{ratio}"


def _print(report: RunReport) -> None:
    print(f"{report.out}: {mebibytes(report.size_bytes)}, {report.bpw:.2f} bits a weight over all tensors")
    print(f"  {report.sites} weights quantized at {report.bpw_sites:.3f} bits, scales included")
    for name, reason in list(report.kept.items())[:10]:
        print(f"  kept in float: {name}: {reason}")
    if len(report.kept) > 10:
        print(f"  ... and {len(report.kept) - 10} more, all in pennyweight.json")
    changed = sorted(set(report.changed.values()))
    for reason in changed[:5]:
        count = list(report.changed.values()).count(reason)
        print(f"  changed for {count}: {reason}")
    if report.fallbacks:
        print(f"  {len(report.fallbacks)} weights carry notes (fallbacks, too few rows): see pennyweight.json")
    if report.leftovers:
        print(f"  left beside it by unfinished runs of other settings: {', '.join(report.leftovers)}")
    memory = mebibytes(report.peak_memory_bytes)
    print(f"  {report.seconds:.0f} s, {memory} of memory at most; verified: {report.verified}")
