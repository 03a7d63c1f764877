"""Everything that is checked and decided before the first byte is written."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from pennyweight.containers.base import Container, ModelFacts
from pennyweight.core.errors import ContainerError, ModelError, UsageError
from pennyweight.core.hashing import Hashes
from pennyweight.core.registry import provided
from pennyweight.models.config_json import read_config_json
from pennyweight.models.hub import resolve
from pennyweight.models.residual import rotated
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.costs.base import Tell as CostTell
from pennyweight.pipeline.costs.base import tell_nobody
from pennyweight.pipeline.job import Draft, Job
from pennyweight.pipeline.measuring import Measuring
from pennyweight.pipeline.options import Options
from pennyweight.pipeline.output import carried_files
from pennyweight.pipeline.planning import check_name, given, preset, problem_of, uniform, within
from pennyweight.pipeline.windows import calibration_windows
from pennyweight.plan.plan import Plan
from pennyweight.plan.plan_file import PlanName

_SCALE_TYPES = ("float16", "bfloat16", "float32")


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
    tell: CostTell = tell_nobody,
) -> Job:
    """Open the model, read the calibration text, plan; raises the PennyweightError that fits what is wrong."""
    draft = drafted(model, options, container, hashes)
    return draft.job(_plan(draft, tell))


def drafted(model: str, options: Options, container: Container | None, hashes: Hashes | None = None) -> Draft:
    """All but the plan. `hashes` may have been begun before; they are closed."""
    options.check()
    container = container or container_for(options.runtime)
    check_name(options.plan, container, runtime=options.runtime)
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
        windows = calibration_windows(streamed, options)
        inputs = {str(file.relative_to(path)): hashes.of(file) for file in _input_files(path)}
    finally:
        hashes.close()
    local = Path(model).expanduser()
    name = local.resolve().name if local.exists() else model
    facts = _facts(streamed)
    container = container.bound(facts)
    named = container.default_scheme if options.bits is None else container.scheme_of_bits(options.bits)
    options = replace(options, scheme=options.scheme or named, bits=None)
    return Draft(streamed, name, container, facts, inputs, windows, options)


def _input_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(
        {
            *path.glob("*.safetensors"),
            *path.glob("*.gguf"),
            *path.glob("*.json"),
            *path.glob("*.py"),
            *carried_files(path),
        }
    )


def _facts(model: StreamedModel) -> ModelFacts:
    return ModelFacts(
        model_type=model.config.model_type,
        path=model.path,
        config=read_config_json(model.path),
        tensors=model.checkpoint.tensors,
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


def _plan(draft: Draft, tell: CostTell) -> Plan:
    options = draft.options
    if isinstance(options.plan, PlanName):
        plan = preset(draft, options.plan.source)
    elif options.plan is not None:
        plan = given(draft, options.plan)
    elif options.budget is not None:
        plan = within(draft, problem_of(draft, Measuring(draft, tell)), options.budget)
    else:
        plan = uniform(draft)
    plan = Plan(plan.schemes, {**plan.kept, **draft.model.refused}, plan.changed)
    if not plan.schemes:
        reason = next(iter(plan.kept.values()), "it has no linear maps in its blocks")
        raise ContainerError(
            f"{draft.container.name} cannot hold any weight of this model as {options.scheme}: {reason}"
        )
    return plan
