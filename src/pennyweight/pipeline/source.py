"""What a run reads its model from: a model directory, or a GGUF file, which llama.cpp alone may know how to run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pennyweight.containers.base import Container, ModelFacts
from pennyweight.core.errors import ContainerError, ModelError, UsageError
from pennyweight.models.base import StoredModel
from pennyweight.models.config_json import read_config_json
from pennyweight.models.gguf_files import gguf_of
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.options import NONE, Options

if TYPE_CHECKING:
    from pennyweight.models.gguf.checkpoint import GgufCheckpoint

_SCALE_TYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Source:
    """options      what was asked for, but for what the model does not allow and nobody asked for by name
    gguf         where the weights come from a GGUF file
    notes        why something is not done that usually is
    why_blind    why the model is not one that is run
    """

    model: StoredModel
    options: Options
    gguf: GgufCheckpoint | None = None
    notes: tuple[str, ...] = ()
    why_blind: str = ""


def open_source(path: Path, options: Options, container: Container, scratch: Path | None) -> Source:
    """The model at `path`; in the directory `scratch` that of a GGUF file may be described for transformers.

    A GGUF file is run by transformers where it can be and calibration data is asked for. Otherwise its weights are
    quantized with the importances of the options, or with none. Raises the PennyweightError that fits.
    """
    first = gguf_of(path)
    # What was written for llama.cpp lies beside a config.json, and needs no other description.
    if first is None or (scratch is None and (path / "config.json").is_file()):
        return Source(StreamedModel(path, trust_remote_code=options.trust_remote_code, device=options.device), options)
    from pennyweight.models.gguf.file import read_gguf
    from pennyweight.models.gguf.model import open_model
    from pennyweight.models.gguf.runnable import runnable

    file = read_gguf(first)
    notes: tuple[str, ...] = ()
    why_blind = "no calibration text was asked for"
    stays_gguf = "llama.cpp" in container.runtimes
    if options.calibration_source is not None or not stays_gguf:
        try:
            if scratch is None:
                raise ModelError("there is no place to describe it for transformers")
            model, checkpoint = runnable(path, file, scratch, device=options.device)
            return Source(model, options, checkpoint)
        except (ModelError, ContainerError) as error:
            if not stays_gguf:
                raise UsageError(f"{path}: transformers cannot run it ({error}): give --for llama.cpp") from error
            why_blind = f"transformers cannot run the model: {str(error).rstrip('.')}"
            options, notes = _blind(first, options, why_blind), (f"no calibration data was used: {why_blind}",)
    alone = open_model(path, file, device=options.device)
    if options.budget is not None:
        notes += ("the plan is chosen by the share of each output that is lost: the model was not run",)
    return Source(alone, options, alone.checkpoint, notes, why_blind)


def _blind(file: Path, options: Options, reason: str) -> Options:
    """The options without data, for a model that cannot be run; raises ModelError where data was asked for."""
    blind = replace(options, calibration=NONE)
    try:
        if options.calibration is not None:
            given = options.calibration
            raise UsageError(f"--calibration {given if isinstance(given, str) else 'texts'}")
        if options.budget is not None and options.budget.is_of_loss:
            raise UsageError(f"{options.budget}")
        blind.check()
    except UsageError as error:
        asked = str(error).split(":")[0]
        raise ModelError(
            f"{file}: {asked}; {reason}. Leave out what needs data, or give --importance FILE, a matrix that "
            "llama-imatrix made."
        ) from error
    return blind


def facts_of(source: Source) -> ModelFacts:
    """What a container must know of the model."""
    model = source.model
    if isinstance(model, StreamedModel):
        return ModelFacts(
            model_type=model.config.model_type,
            path=model.path,
            config=read_config_json(model.path),
            tensors=model.checkpoint.tensors,
            gguf=source.gguf,
            linear_names=model.linear_names(),
            tied_head=model.tied_head,
            dtype=_loaded_dtype(model),
        )
    assert source.gguf is not None
    return ModelFacts(
        model_type=str(source.gguf.file.fields["general.architecture"].value),
        path=model.path,
        tensors=model.checkpoint.tensors,
        gguf=source.gguf,
        linear_names=(),
        tied_head=model.head is None,
        dtype="float16",
    )


def _loaded_dtype(model: StreamedModel) -> str:
    """The type in which transformers loads the model: the config's, else the one that most stored weights have."""
    for config in (model.config, model.config.get_text_config()):
        named = str(getattr(config, "dtype", None)).removeprefix("torch.")
        if named in _SCALE_TYPES:
            return named
    stored: Counter[str] = Counter()
    for info in model.checkpoint.tensors.values():
        stored[str(info.dtype).removeprefix("torch.")] += info.size_bytes
    return next((name for name, _ in stored.most_common() if name in _SCALE_TYPES), "float32")
