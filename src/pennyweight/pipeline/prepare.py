"""Everything that is checked and decided before the first byte is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pennyweight.containers.base import Container
from pennyweight.core.errors import ContainerError, ModelError, UsageError
from pennyweight.core.hashing import Hashes
from pennyweight.core.registry import provided
from pennyweight.models.gguf_files import gguf_of, gguf_parts
from pennyweight.models.hub import resolve
from pennyweight.models.residual import rotated
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.costs.base import Tell as CostTell
from pennyweight.pipeline.costs.base import tell_nobody
from pennyweight.pipeline.importance import known_statistics
from pennyweight.pipeline.job import Draft, Job
from pennyweight.pipeline.measuring import measuring
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.output import carried_files
from pennyweight.pipeline.planning import check_name, given, preset, problem_of, uniform, within
from pennyweight.pipeline.source import facts_of, open_source
from pennyweight.pipeline.windows import calibration_windows
from pennyweight.plan.plan import Plan
from pennyweight.plan.plan_file import PlanName


def container_for(runtime: str) -> Container:
    """The container that `runtime` reads; raises UsageError that lists the runtimes."""
    known: dict[str, Container] = {}
    for candidate in provided("containers").values():
        known.update(dict.fromkeys(candidate.runtimes, candidate))
    if runtime not in known:
        raise UsageError(f"--for {runtime}: not a runtime that is supported; choose from {', '.join(sorted(known))}")
    return known[runtime]


def prepare(
    model: str,
    options: Options,
    container: Container | None,
    hashes: Hashes | None = None,
    *,
    scratch: Path | None = None,
    tell: CostTell = tell_nobody,
) -> Job:
    """Open the model, read the calibration text, plan; raises the PennyweightError that fits what is wrong."""
    draft = drafted(model, options, container, hashes, scratch=scratch)
    return draft.job(_plan(draft, tell))


def drafted(
    model: str,
    options: Options,
    container: Container | None,
    hashes: Hashes | None = None,
    *,
    scratch: Path | None = None,
) -> Draft:
    """All but the plan. `hashes` may have been begun before; they are closed. `scratch` is a directory for what
    transformers must be told of a GGUF file; it must be there as long as the draft is used."""
    options.check()
    container = container or container_for(options.runtime)
    check_name(options.plan, container, runtime=options.runtime)
    hashes = Hashes() if hashes is None else hashes
    try:
        path = resolve(model, trust_remote_code=options.trust_remote_code)
        # Hashing reads the whole model once; it runs while transformers is imported and text is tokenized.
        files = _input_files(path, options)
        hashes.begin(files.values())
        source = open_source(path, options, container, scratch)
        options, opened = source.options, source.model
        windows = None
        if options.rotate and source.gguf is not None:
            raise UsageError(f"{path}: --rotate rewrites all weights, and a GGUF file stays what it is: leave it out")
        if isinstance(opened, StreamedModel):
            opened = _rotated(opened, options)
            windows = calibration_windows(opened, options)
        inputs = {name: hashes.of(file) for name, file in files.items()}
    finally:
        hashes.close()
    local = Path(model).expanduser()
    name = local.resolve().name if local.exists() else model
    facts = facts_of(replace(source, model=opened))
    container = container.bound(facts)
    named = container.default_scheme if options.bits is None else container.scheme_of_bits(options.bits)
    options = replace(options, scheme=options.scheme or named, bits=None)
    draft = Draft(opened, name, container, facts, inputs, windows, options, notes=source.notes)
    if options.importance is None:
        return draft
    if "llama.cpp" not in container.runtimes:
        raise UsageError(f"--importance {options.importance}: it speaks of llama.cpp's weights: give --for llama.cpp")
    known = known_statistics(Path(options.importance), container, draft.listed, device=opened.device)
    return replace(draft, known=known)


def _rotated(model: StreamedModel, options: Options) -> StreamedModel:
    if options.loss_aware and not model.is_decoder:
        raise ModelError(
            f"{type(model.module).__name__} has no language-model head, so there is no loss to be aware of: "
            "drop --loss-aware"
        )
    return rotated(model, seed=options.seed) if options.rotate else model


def _input_files(path: Path, options: Options) -> dict[str, Path]:
    """What the result depends on, by the name that the recipe gives it."""
    files: list[Path] = []
    if path.is_dir():
        found = {*path.glob("*.safetensors"), *path.glob("*.json"), *path.glob("*.py"), *carried_files(path)}
        files = sorted(found)
    first = gguf_of(path)
    named = {str(file.relative_to(path)): file for file in files}
    named |= {} if first is None else {file.name: file for file in gguf_parts(first)}
    return named if options.importance is None else {**named, "--importance": Path(options.importance)}


def _plan(draft: Draft, tell: CostTell) -> Plan:
    options = draft.options
    if isinstance(options.plan, PlanName):
        plan = preset(draft, options.plan.source)
    elif options.plan is not None:
        plan = given(draft, options.plan)
    elif options.budget is not None:
        plan = within(draft, problem_of(draft, measuring(draft, tell)), options.budget)
    else:
        plan = uniform(draft)
    plan = Plan(plan.schemes, {**plan.kept, **draft.model.refused}, plan.changed)
    if not plan.schemes:
        reason = next(iter(plan.kept.values()), "it has no linear maps in its blocks")
        raise ContainerError(
            f"{draft.container.name} cannot hold any weight of this model as {options.scheme}: {reason}"
        )
    return plan
