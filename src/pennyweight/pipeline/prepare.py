"""Everything that is checked and decided before the first byte is written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pennyweight.containers.base import Container, ModelFacts
from pennyweight.containers.weight_files import WeightFiles
from pennyweight.core.errors import ContainerError, ModelError, UsageError
from pennyweight.core.hashing import Hashes
from pennyweight.core.registry import provided
from pennyweight.models import text
from pennyweight.models.base import Site, TensorInfo
from pennyweight.models.hub import resolve
from pennyweight.models.residual import rotated
from pennyweight.models.self_text import SELF, own_windows
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.output import carried_files, weight_entries
from pennyweight.pipeline.records import CalibrationRecipe, Recipe
from pennyweight.plan.plan import Plan
from pennyweight.plan.uniform import uniform_plan
from pennyweight.schemes import parse_scheme

_SCALE_TYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Job:
    """A run that has been checked and planned; nothing has been written.

    model_name   what the result's model card calls the original
    entries      every tensor that will be written
    windows      calibration token ids [windows, length], None for a data-free run
    """

    model: StreamedModel
    model_name: str
    container: Container
    plan: Plan
    facts: ModelFacts
    entries: Mapping[str, TensorInfo]
    layout: WeightFiles
    recipe: Recipe
    windows: Tensor | None
    options: Options


def container_for(runtime: str) -> Container:
    """The container that `runtime` reads; raises UsageError that lists the runtimes."""
    known: dict[str, Container] = {}
    for candidate in provided("containers").values():
        known.update(dict.fromkeys(candidate.runtimes, candidate))
    if runtime not in known:
        raise UsageError(f"--for {runtime}: not a runtime that is supported; choose from {', '.join(sorted(known))}")
    return known[runtime]


def prepare(model: str, options: Options, container: Container | None, hashes: Hashes | None = None) -> Job:
    """Open the model, plan, read the calibration text; raises the PennyweightError that fits what is wrong.

    `hashes` may have been begun before; they are closed.
    """
    options.check()
    container = container or container_for(options.runtime)
    hashes = Hashes() if hashes is None else hashes
    try:
        path = resolve(model, trust_remote_code=options.trust_remote_code)
        # Hashing reads the whole model once; it runs while transformers is imported and text is tokenized.
        hashes.begin(_input_files(path))
        streamed = StreamedModel(path, trust_remote_code=options.trust_remote_code, device=options.device)
        if options.loss_aware and not streamed.is_decoder:
            raise ModelError(
                f"{type(streamed.module).__name__} has no language-model head, so there is no loss to be aware of: "
                "drop --loss-aware"
            )
        if options.rotate:
            streamed = rotated(streamed, seed=options.seed)
        facts = _facts(streamed)
        plan = _plan(streamed, facts, options, container)
        windows = calibration_windows(streamed, options, samples=options.samples)
        inputs = {str(file.relative_to(path)): hashes.of(file) for file in _input_files(path)}
        recipe = _recipe(options, container, windows, inputs)
    finally:
        hashes.close()
    entries = weight_entries(container, plan, streamed.sites, streamed.checkpoint)
    local = Path(model).expanduser()
    name = local.resolve().name if local.exists() else model
    layout = WeightFiles.plan(entries)
    return Job(streamed, name, container, plan, facts, entries, layout, recipe, windows, options)


def _input_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted({*path.glob("*.safetensors"), *path.glob("*.json"), *path.glob("*.py"), *carried_files(path)})


def _facts(model: StreamedModel) -> ModelFacts:
    return ModelFacts(
        model_type=model.config.model_type,
        linear_names=model.linear_names(),
        tied_head=model.tied_head,
        dtype=_loaded_dtype(model),
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


def _plan(model: StreamedModel, facts: ModelFacts, options: Options, container: Container) -> Plan:
    blocks = [site for site in model.sites if site.kind != "head"]
    plan = _uniform(blocks, options.scheme, facts, options, container)
    head = _head_plan(model, facts, options, container)
    plan = Plan({**plan.schemes, **head.schemes}, {**plan.kept, **model.refused}, {**plan.changed, **head.changed})
    if not plan.schemes:
        reason = next(iter(plan.kept.values()), "it has no linear maps in its blocks")
        raise ContainerError(f"{container.name} cannot hold any weight of this model as {options.scheme}: {reason}")
    refusal = container.why_not_plan(plan, model.sites, facts, runtime=options.runtime)
    if refusal is not None:
        raise ContainerError(f"{container.name} for {options.runtime} cannot hold this plan: {refusal}")
    return plan


def _uniform(sites: Sequence[Site], scheme: str, facts: ModelFacts, options: Options, container: Container) -> Plan:
    by_name = {site.name: site for site in sites}
    return uniform_plan(
        {name: site.shape for name, site in by_name.items()},
        parse_scheme(scheme).with_scale_dtype(getattr(torch, facts.dtype)),
        lambda candidate, name: container.why_not(candidate, by_name[name], runtime=options.runtime),
    )


def _head_plan(model: StreamedModel, facts: ModelFacts, options: Options, container: Container) -> Plan:
    """The scheme that was asked for the head; raises the PennyweightError that says why it cannot have it."""
    if options.head is None:
        return Plan({})
    if model.head is None:
        raise UsageError(f"--head {options.head}: {model.why_no_head}; without --head it stays as it is")
    plan = _uniform([model.head], options.head, facts, options, container)
    for reason in plan.kept.values():
        raise ContainerError(f"{container.name} for {options.runtime} cannot hold this output head: {reason}")
    return plan


def calibration_windows(model: StreamedModel, options: Options, *, samples: int) -> Tensor | None:
    """At most `samples` windows [windows, length] of the options' calibration text; None for a data-free run."""
    source = options.calibration_source
    if source is None:
        return None
    length = min(options.length, text.context_length(model.config) or options.length)
    if source == SELF:
        return own_windows(model, length=length, count=samples, seed=options.seed)
    tokenizer = text.load_tokenizer(model.path, trust_remote_code=options.trust_remote_code)
    documents: Sequence[str] = text.documents(source, tokenizer) if isinstance(source, str) else source
    windows = text.windows(documents, tokenizer, length=length, count=samples, seed=options.seed)
    text.check_vocabulary(windows, model.config, [str(model.path)])
    return windows


def _recipe(options: Options, container: Container, windows: Tensor | None, inputs: Mapping[str, str]) -> Recipe:
    calibration = None
    if windows is not None:
        source = options.calibration_source
        digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        calibration = CalibrationRecipe(
            source if isinstance(source, str) else "texts", windows.shape[0], windows.shape[1], options.seed, digest
        )
    steps = options.steps
    return Recipe(
        scheme=options.scheme,
        head=options.head,
        effort=options.effort,
        rotate=options.rotate,
        transform=steps.transform,
        solver=steps.solver,
        staged=steps.staged,
        refine=steps.refine,
        recover=steps.recover,
        loss_aware=options.loss_aware,
        fit=options.fit,
        runtime=options.runtime,
        container=container.name,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        calibration=calibration,
        inputs=inputs,
    )
