"""Recovery as the last part of a run, before the result is published."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pennyweight.core.files import sync_directory
from pennyweight.models import text
from pennyweight.models.base import Site
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.output import Output
from pennyweight.pipeline.prepare import Job
from pennyweight.train.recover import Recovered, Settings, Step, recover

# New values on their way into the weight files: there whole or not at all.
_REDO = "recovered.safetensors"
_SCRATCH = "recovery-"


@dataclass(frozen=True)
class Recovery:
    """A `Finish` of the pipeline: `recover` on what was written, with the run's own calibration text."""

    settings: Settings = field(default_factory=Settings)
    tell: Callable[[Step], None] = lambda step: None

    @property
    def name(self) -> str:
        return f"recovery: {self.settings}"

    def __call__(self, job: Job, output: Output, directory: Path) -> dict[str, Any]:
        """Change scales, norms and biases in the weight files of `output`, in their places; returns what was found.

        New values go to a file in `directory` first, so that a run which is killed before it is there starts over
        from what the solver wrote, and one which is killed later writes them again.
        """
        redo = directory / _REDO
        for leftover in directory.glob(f"{_SCRATCH}*"):
            shutil.rmtree(leftover)
        if not redo.exists():
            recovered = self._recovered(job, output, directory)
            _save(redo, _changed(job, output, recovered), _findings(recovered))
        found = _apply(redo, output)
        redo.unlink()
        return found

    def _recovered(self, job: Job, output: Output, directory: Path) -> Recovered:
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory))
        try:
            original = StreamedModel(
                job.model.path, trust_remote_code=job.options.trust_remote_code, device=job.options.device
            )
            weights = {site.name: output.read(site) for site in _sites(job)}
            windows = _windows(job, self.settings)
            return recover(job.model, original, weights, windows, scratch, settings=self.settings, tell=self.tell)
        finally:
            shutil.rmtree(scratch)


def _sites(job: Job) -> list[Site]:
    return [site for site in job.model.sites if site.name in job.plan.schemes]


def _windows(job: Job, settings: Settings) -> Tensor:
    """Windows of the run's calibration text, of the built-in text where the run had none."""
    options = job.options
    source = options.calibration_source or text.BUILT_IN
    tokenizer = text.load_tokenizer(job.model.path, trust_remote_code=options.trust_remote_code)
    documents = text.documents(source, tokenizer) if isinstance(source, str) else source
    length = min(options.length, text.context_length(job.model.config) or options.length)
    windows = text.windows(documents, tokenizer, length=length, count=settings.windows, seed=options.seed)
    text.check_vocabulary(windows, job.model.config, [str(job.model.path)])
    return windows


def _changed(job: Job, output: Output, recovered: Recovered) -> dict[str, Tensor]:
    """The tensors of the output that are no longer as they were written."""
    changed: dict[str, Tensor] = {}
    if recovered.step == 0:
        return changed
    for site in _sites(job):
        changed.update(_differing(output, output.container.encode(site, recovered.weights[site.name])))
    changed.update(_differing(output, recovered.vectors))
    return changed


def _differing(output: Output, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in found.items() if not torch.equal(tensor, output.files.read(name))}


def _findings(recovered: Recovered) -> dict[str, Any]:
    return {
        "held_out_before": recovered.before,
        "held_out_after": recovered.after,
        "best_step": recovered.step,
        "steps": recovered.steps,
    }


def _save(redo: Path, tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    partial = redo.with_name(redo.name + ".partial")
    save_file(dict(tensors), partial, metadata={"found": json.dumps(dict(found))})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, redo)
    sync_directory(redo.parent)


def _apply(redo: Path, output: Output) -> dict[str, Any]:
    with safe_open(redo, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            output.files.write(name, file.get_tensor(name))
        found: dict[str, Any] = json.loads(file.metadata()["found"])
    output.files.flush()
    return found
