"""Recovery as the last part of a run, before the result is published."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
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
from pennyweight.pipeline.job import Job
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.output import Output
from pennyweight.pipeline.windows import some_windows
from pennyweight.pipeline.written import WrittenCheckpoint
from pennyweight.train.recovery.recover import Recovered, Settings, Step, recover, split

# New values on their way into the weight files: there whole or not at all.
_REDO = "recovered.safetensors"


@dataclass(frozen=True)
class Recovery:
    """A `Finish` of the pipeline: `recover` on what was written, with the run's own calibration text."""

    settings: Settings = field(default_factory=Settings)
    tell: Callable[[Step], None] = lambda step: None

    @staticmethod
    def of(options: Options, tell: Callable[[Step], None] = lambda step: None) -> Recovery | None:
        """What `options` ask for; None where they ask for none."""
        return Recovery(Settings(epochs=options.recover_epochs), tell) if options.steps.recover else None

    @property
    def name(self) -> str:
        return f"recovery: {self.settings}"

    def check(self, job: Job) -> None:
        """Raises DataError for windows that `recover` does not take."""
        windows = some_windows(job.streamed, job.options, job.windows)
        split(len(text.batches(windows)), self.settings)

    def __call__(self, job: Job, output: Output, scratch: Path) -> dict[str, Any]:
        """Change scales, norms and biases in the weight files of `output`, in their places; returns what was found.

        New values go to a file in `scratch` first, so that a run which is killed before it is there starts over from
        what the solver wrote, and one which is killed later writes them again.
        """
        redo = scratch / _REDO
        if not redo.exists():
            windows = some_windows(job.streamed, job.options, job.windows)
            recovered = self._recovered(job, output, scratch, windows)
            _save(redo, _changed(job, output, recovered), _findings(recovered, windows))
        return _apply(redo, output)

    def _recovered(self, job: Job, output: Output, scratch: Path, windows: Sequence[Tensor]) -> Recovered:
        options = job.options
        original = StreamedModel(job.model.path, trust_remote_code=options.trust_remote_code, device=options.device)
        weights = {site.name: output.read(site) for site in _sites(job)}
        with tempfile.TemporaryDirectory(dir=scratch) as teacher:
            return recover(
                _as_written(job, output),
                original,
                weights,
                windows,
                Path(teacher),
                settings=self.settings,
                tell=self.tell,
            )


def _as_written(job: Job, output: Output) -> StreamedModel:
    """The model with what is kept in float as a transform may have left it."""
    kept = frozenset(output.kept_tensors(job.listed))
    checkpoint = WrittenCheckpoint(job.model.checkpoint, output, kept, job.embedding)
    options = job.options
    return StreamedModel(
        job.model.path, trust_remote_code=options.trust_remote_code, device=options.device, checkpoint=checkpoint
    )


def _sites(job: Job) -> list[Site]:
    return [site for site in job.quantized if site.kind != "embedding"]


def _changed(job: Job, output: Output, recovered: Recovered) -> dict[str, Tensor]:
    """The tensors of the output that are no longer as they were written."""
    changed: dict[str, Tensor] = {}
    if recovered.step == 0:
        return changed
    for site in _sites(job):
        changed.update(_differing(output, output.container.encode(site, recovered.weights[site.name])))
    vectors = {name: output.encode_kept(name, tensor) for name, tensor in recovered.vectors.items()}
    changed.update(_differing(output, vectors))
    return changed


def _differing(output: Output, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in found.items() if not torch.equal(tensor, output.files.read(name))}


def _findings(recovered: Recovered, windows: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "windows": len(windows),
        "tokens_sha256": text.digest(windows),
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
