"""The main job with its proof: quantize, then open the result in its runtime before saying that it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pennyweight.core.hashing import Hashes
from pennyweight.evaluate.planned import TellTrial, planned
from pennyweight.evaluate.verify import Extent, verify
from pennyweight.pipeline.costs.base import Tell as CostTell
from pennyweight.pipeline.costs.base import tell_nobody
from pennyweight.pipeline.effort import Effort
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.records import RunReport, Tell
from pennyweight.pipeline.run import check_target
from pennyweight.pipeline.run import quantize as run
from pennyweight.plan.budget import parse_budget
from pennyweight.plan.plan_file import given_plan
from pennyweight.schemes.fit import Fit
from pennyweight.train.recovery.finish import Recovery
from pennyweight.train.recovery.recover import Step


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | None = None,
    bits: int | None = None,
    size: str | int | None = None,
    bpw: float | None = None,
    max_kl: float | None = None,
    max_loss: str | float | None = None,
    task: str | Path | None = None,
    plan: str | Path | Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    at: Sequence[str] = (),
    effort: Effort = Options.effort,
    rotate: bool = False,
    transform: str | None = None,
    solver: str | None = None,
    staged: bool | None = None,
    refine: str | None = None,
    recover: bool | None = None,
    recover_epochs: float = Options.recover_epochs,
    loss_aware: bool = False,
    fit: Fit = Options.fit,
    runtime: str = Options.runtime,
    calibration: str | Sequence[str] | None = None,
    importance: str | Path | None = None,
    samples: int = Options.samples,
    length: int = Options.length,
    seed: int = Options.seed,
    device: str = Options.device,
    trust_remote_code: bool = False,
    verification: Extent = "full",
    tell: Tell = lambda done: None,
    tell_step: Callable[[Step], None] = lambda step: None,
    tell_cost: CostTell = tell_nobody,
    tell_trial: TellTrial = lambda trial: None,
    hashes: Hashes | None = None,
) -> RunReport:
    """Quantize a model directory, Hub id or GGUF file into the new directory `out`, verified.

    One of `size` ("4GB", all files), `bpw` (all tensors), `max_kl`, `max_loss` ("1%" of perplexity, or points of the
    `task` file) and `plan` (a file, globs of sites -> schemes, a name) stands in place of `scheme`; the rest as in
    Options. `tell...` hear of blocks, steps, costs, trials. Raises PennyweightError, and then `out` does not exist."""
    options = Options(
        scheme=scheme, bits=bits, budget=parse_budget(size=size, bpw=bpw, max_kl=max_kl, max_loss=max_loss, task=task),
        plan=given_plan(plan), keep=tuple(keep), at=tuple(at), runtime=runtime, effort=effort, rotate=rotate,
        transform=transform, solver=solver, staged=staged, refine=refine, recover=recover, loss_aware=loss_aware,
        recover_epochs=recover_epochs, fit=fit, importance=None if importance is None else str(importance),
        calibration=calibration if calibration is None or isinstance(calibration, str) else tuple(calibration),
        samples=samples, length=length, seed=seed, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    options, evidence = _settled(str(model), options, check_target(out).parent, tell=tell_cost, tell_trial=tell_trial)
    return run(
        str(model), out, options, finish=Recovery.of(options, tell_step),
        verify=partial(proved, runtime=runtime, extent=verification, trust_remote_code=trust_remote_code),
        tell=tell, tell_cost=tell_cost, evidence=evidence, hashes=hashes,
    )  # fmt: skip


def _settled(
    model: str, options: Options, scratch: Path, *, tell: CostTell, tell_trial: TellTrial
) -> tuple[Options, dict[str, Any]]:
    """`options` with the plan of a budget of loss in its place, and the evidence for it."""
    if options.budget is None or not options.budget.is_of_loss:
        return options, {}
    chosen = planned(model, options, scratch=scratch, tell=tell, tell_trial=tell_trial)
    return replace(options, budget=None, keep=(), at=(), plan=chosen.entries), chosen.evidence


def proved(directory: Path, *, runtime: str, extent: Extent, trust_remote_code: bool) -> dict[str, Any]:
    """What its runtime makes of an artefact; see verify."""
    if runtime != "vllm" or extent == "none":
        return verify(directory, extent=extent, trust_remote_code=trust_remote_code)
    # What another runtime takes transformers may refuse to load, or load wrongly.
    found = verify(directory, extent="blocks", trust_remote_code=trust_remote_code)
    found["reason"] = f"decoded weight by weight; not verified in {runtime}, which was not run"
    return found
