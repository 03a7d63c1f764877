"""`pennyweight quantize`: the main job."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pennyweight.cli import options as shared
from pennyweight.cli.console import (
    Bar,
    Clock,
    cost_teller,
    device_of,
    mebibytes,
    put_json,
    say,
    set_jobs,
    trial_teller,
)
from pennyweight.cli.quantize_network import RUNTIMES, quantize_network
from pennyweight.core.hashing import Hashes
from pennyweight.core.memory import settle_imports

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from pennyweight.core.errors import UsageError
    from pennyweight.pipeline.records import BlockDone, RunReport, SiteRecord, Tell
    from pennyweight.train.recovery.recover import Step


_Out = Annotated[str, typer.Option(help="Directory to write; must be new or empty.")]
_Scheme = Annotated[
    str | None,
    typer.Option(help="Short name: int4-g128, int4-g32-asym, nvfp4, q4_k...  [default: int4-g128; q4_k for llama.cpp]"),
]
_Bits = Annotated[
    int | None, typer.Option(min=2, max=8, help="Instead of --scheme: this width, as the target has it best.")
]
_Rotate = Annotated[
    bool, typer.Option("--rotate", help="Rotate the residual stream first; a head that is tied is untied.")
]
_Transform = Annotated[str | None, typer.Option(help="How a block is rewritten before that: awq or none.")]
_Solver = Annotated[
    str | None, typer.Option(help="How the codes of one matrix are chosen: qronos, gptq, gptq-refined, nearest...")
]
_Staged = Annotated[
    bool | None,
    typer.Option(
        "--staged/--no-staged", help="Calibrate each matrix behind the quantized ones before it in its block."
    ),
]
_Plan = Annotated[
    str | None, typer.Option(help="Plan file: the scheme of each weight, chosen before; or Q4_K_M... for llama.cpp.")
]
_Importance = Annotated[
    str | None,
    typer.Option(help="Importance matrix of llama.cpp, in place of calibration.  [needs --for llama.cpp]"),
]
_Refine = Annotated[
    str | None, typer.Option(help="How those of a block are refined together: signed-gradient, sigmoid or none.")
]
_Recover = Annotated[
    bool | None, typer.Option("--recover/--no-recover", help="Train scales and norms end to end at last.")
]
_RecoverEpochs = Annotated[float, typer.Option(help="Passes of that training over the calibration windows.")]
_LossAware = Annotated[
    bool, typer.Option("--loss-aware/--no-loss-aware", help="Weigh tokens by how much the loss depends on them.")
]
_Fit = Annotated[str, typer.Option(help="How scales are fitted: search or minmax.")]
_Ranges = Annotated[
    str | None,
    typer.Option(help="Ranges of values between operations: output, minmax, mse...  [for onnxruntime, openvino]"),
]
_Equalize = Annotated[
    bool | None,
    typer.Option(
        "--equalize/--no-equalize", help="Even out channel ranges across layers first.  [for onnxruntime, openvino]"
    ),
]
_Verify = Annotated[str, typer.Option(help="How the result is checked in its runtime: full, blocks or none.")]


def quantize(
    model: shared.Model,
    out: _Out,
    scheme: _Scheme = None,
    bits: _Bits = None,
    size: shared.Size = None,
    bpw: shared.Bpw = None,
    max_kl: shared.MaxKl = None,
    max_loss: shared.MaxLoss = None,
    task: shared.Task = None,
    plan: _Plan = None,
    keep: shared.Keep = None,
    at: shared.At = None,
    runtime: shared.Runtime = "transformers",
    effort: shared.Effort = "normal",
    rotate: _Rotate = False,
    transform: _Transform = None,
    solver: _Solver = None,
    staged: _Staged = None,
    refine: _Refine = None,
    recover: _Recover = None,
    recover_epochs: _RecoverEpochs = 3.0,
    loss_aware: _LossAware = False,
    fit: _Fit = "search",
    ranges: _Ranges = None,
    equalize: _Equalize = None,
    calibration: shared.Calibration = None,
    importance: _Importance = None,
    samples: shared.Samples = 128,
    length: shared.Length = 512,
    seed: shared.Seed = 0,
    device: shared.Device = "auto",
    jobs: shared.Jobs = None,
    verify: _Verify = "full",
    trust_remote_code: shared.Trust = False,
    as_json: shared.Json = False,
) -> None:
    """Quantize a model, and verify it in its runtime.

    After a crash or Ctrl-C the same command continues where it was. For onnxruntime and openvino MODEL may also be
    FILE.py:NAME, a torch module or a function that makes one, or a .pt2 file.
    """
    asked = dict(locals())
    del asked["model"], asked["out"]
    (quantize_network if runtime in RUNTIMES else _quantize_model)(model, out, asked)


def _quantize_model(model: str, out: str, asked: Mapping[str, Any]) -> None:
    """A language model or an encoder, block by block, with the options of the command by name."""
    given = dict(asked)
    if [name for name in ("ranges", "equalize") if given.pop(name) is not None]:
        raise _for_networks(given["runtime"])
    _check(given, given.pop("verify"))
    # Beside the imports, which take seconds.
    hashes = Hashes(sorted(Path(model).glob("*.safetensors")))
    gc.disable()
    from pennyweight.evaluate.proved import quantize as job

    set_jobs(given.pop("jobs"))
    as_json = given.pop("as_json")
    given |= {"keep": given["keep"] or (), "at": given["at"] or (), "device": device_of(given["device"])}
    report = job(
        model, out, **given, verification=asked["verify"], tell=teller(), tell_step=step_teller(),
        tell_cost=cost_teller(), tell_trial=trial_teller(), hashes=hashes,
    )  # fmt: skip
    put_json(report) if as_json else _print(report)


def _for_networks(runtime: str) -> UsageError:
    from pennyweight.core.errors import UsageError

    return UsageError(f"--ranges and --equalize are for networks, --for onnxruntime or openvino, not for {runtime}")


def _check(asked: Mapping[str, Any], verify: str) -> None:
    from pennyweight.core.errors import UsageError

    one_of = ("scheme", "bits", "size", "bpw", "max_kl", "max_loss", "plan")
    if sum(asked[name] is not None for name in one_of) > 1:
        raise UsageError("give one of --scheme, --bits, --size, --bpw, --max-kl, --max-loss and --plan")
    if verify not in ("full", "blocks", "none"):
        raise UsageError(f"--verify {verify}: give full, blocks or none")


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
    for note in report.notes:
        print(f"  {note}")
    if report.fallbacks:
        print(f"  {len(report.fallbacks)} weights carry notes (fallbacks, too few rows): see pennyweight.json")
    if report.leftovers:
        print(f"  left beside it by unfinished runs of other settings: {', '.join(report.leftovers)}")
    memory = mebibytes(report.peak_memory_bytes)
    print(f"  {report.seconds:.0f} s, {memory} of memory at most; verified: {report.verified}")
