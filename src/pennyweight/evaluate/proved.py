"""The main job with its proof: quantize, then open the result in its runtime before saying that it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pennyweight.core.hashing import Hashes
from pennyweight.evaluate.verify import Extent, verify
from pennyweight.pipeline.effort import Effort
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.records import RunReport, Tell
from pennyweight.pipeline.run import quantize as run
from pennyweight.schemes.fit import Fit
from pennyweight.train.finish import Recovery
from pennyweight.train.recover import Step


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str = Options.scheme,
    head: str | None = None,
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
    samples: int = Options.samples,
    length: int = Options.length,
    seed: int = Options.seed,
    device: str = Options.device,
    trust_remote_code: bool = False,
    verification: Extent = "full",
    tell: Tell = lambda done: None,
    tell_step: Callable[[Step], None] = lambda step: None,
    hashes: Hashes | None = None,
) -> RunReport:
    """Quantize a model directory or Hub id into the new directory `out`, verified.

    `calibration` is a text file, a .jsonl, a directory, "built-in", "none", or the texts themselves; see Options for
    the rest. `tell` hears of each block, `tell_step` of each step of recovery; `hashes` of the model's files may have
    been begun. Returns what was done; raises PennyweightError, and then `out` does not exist.
    """
    options = Options(
        scheme=scheme, head=head, runtime=runtime, effort=effort, rotate=rotate, transform=transform, solver=solver,
        staged=staged, refine=refine, recover=recover, recover_epochs=recover_epochs, loss_aware=loss_aware, fit=fit,
        calibration=calibration if calibration is None or isinstance(calibration, str) else tuple(calibration),
        samples=samples, length=length, seed=seed, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip

    def prove(directory: Path) -> dict[str, Any]:
        if runtime == "transformers" or verification == "none":
            return verify(directory, extent=verification, trust_remote_code=trust_remote_code)
        # What another runtime takes transformers may refuse to load, or load wrongly.
        found = verify(directory, extent="blocks", trust_remote_code=trust_remote_code)
        found["reason"] = f"decoded weight by weight; not verified in {runtime}, which was not run"
        return found

    finish = Recovery.of(options, tell_step)
    return run(str(model), out, options, finish=finish, verify=prove, tell=tell, hashes=hashes)
