"""An artefact in another container: the same codes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.core.errors import ContainerError, ModelError, VerificationError
from pennyweight.core.parallel import one_thread_per_operation, parallel_map
from pennyweight.models.base import Checkpoint, Site
from pennyweight.models.checkpoint import open_checkpoint
from pennyweight.models.coded import coded_tensors
from pennyweight.models.config_json import read_config_json
from pennyweight.models.decoders import decoded
from pennyweight.models.decoders.base import Coded
from pennyweight.pipeline.job import Draft, Job
from pennyweight.pipeline.journal import Journal
from pennyweight.pipeline.matching import Match, best_match, plan_of
from pennyweight.pipeline.options import NONE, Options
from pennyweight.pipeline.output import Output
from pennyweight.pipeline.prepare import drafted
from pennyweight.pipeline.record import RECORD_NAME
from pennyweight.pipeline.records import COPIED, RunReport, SiteRecord
from pennyweight.pipeline.run import check_target, produce
from pennyweight.schemes import reexpressed

TellSite = Callable[[int, int], None]
# (directory of the result) -> what was found; see verify.
Prove = Callable[[Path], dict[str, Any]]
_SHOWN = 5


@one_thread_per_operation()
def convert(
    artefact: str,
    out: str | Path,
    *,
    runtime: str,
    allow_float: bool = False,
    trust_remote_code: bool = False,
    prove: Prove | None = None,
    tell: TellSite = lambda done, total: None,
) -> RunReport:
    """Write the codes of the quantized model `artefact` into the new directory `out` for `runtime`; nothing is rounded.

    Every weight that comes out is the one that went in, bit for bit, or the unrounded product of the same numbers where
    only the new reader multiplies in a wider type (recorded). With `allow_float` weights whose codes the container
    cannot hold stay in float, decoded. `prove(directory)` has the last word, behind a comparison of every weight.
    Raises ModelError where there are no codes and ContainerError that lists what cannot be held.
    """
    started = time.perf_counter()
    target = check_target(out)
    asked = Options(runtime=runtime, solver="nearest", calibration=NONE, trust_remote_code=trust_remote_code)
    draft = drafted(artefact, asked, None)
    coded = coded_tensors(draft.model.checkpoint)
    if not coded:
        raise ModelError(
            f"{artefact}: it has no codes that could be copied: quantize it, or give the directory of a model that is "
            "quantized (compressed-tensors or GGUF)"
        )
    match = best_match(draft, coded)
    _check(match, draft, allow_float=allow_float)
    job = _job(draft, match, coded)

    def write(output: Output, directory: Path, journal: Journal) -> list[SiteRecord]:
        return _copy(job, output, coded, tell)

    def checked(directory: Path) -> dict[str, Any]:
        compared = _compared(job, match, coded, directory)
        return {**(prove(directory) if prove is not None else {"verified": "none"}), **compared}

    found = {"conversion": _origin(draft, coded, match)}
    return produce(job, target, write, verify=checked, started=started, found=found)


def _check(match: Match, draft: Draft, *, allow_float: bool) -> None:
    what = f"{draft.container.name} for {draft.options.runtime}"
    if match.rounded and (allow_float or not match.lost):
        raise ContainerError(
            f"{what} loads the model in {match.dtype}, which would round {_some(match.rounded)}: choose another --for"
        )
    if match.lost and not allow_float:
        advice = "" if match.rounded else ". Give --allow-float to keep these in float, decoded"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(match.lost.items())[:_SHOWN])
        more = f"; and {len(match.lost) - _SHOWN} more" if len(match.lost) > _SHOWN else ""
        raise ContainerError(f"{what} cannot hold the codes of {len(match.lost)} weights: {reasons}{more}{advice}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _job(draft: Draft, match: Match, coded: Mapping[str, Coded | None]) -> Job:
    draft = replace(draft, facts=replace(draft.facts, dtype=match.dtype))
    plan = plan_of(draft, match, coded)
    if not plan.schemes:
        raise ContainerError(
            f"{draft.container.name} for {draft.options.runtime} cannot hold any code of this model: "
            f"{Counter(match.lost.values()).most_common(1)[0][0]}"
        )
    job = draft.job(plan)
    names = list(dict.fromkeys(scheme.name for scheme in plan.schemes.values()))
    return replace(job, recipe=replace(job.recipe, scheme=names[0], plan=plan.names, solver=COPIED))


def _copy(job: Job, output: Output, coded: Mapping[str, Coded | None], tell: TellSite) -> list[SiteRecord]:
    output.copy_kept(output.kept_tensors(job.listed))
    errors = _errors(job)
    done: list[str] = []

    def one(site: Site) -> SiteRecord:
        stored, scheme = coded[site.tensor], job.plan.schemes[site.name]
        assert stored is not None
        weight = reexpressed(stored.read(), scheme)
        assert not isinstance(weight, str), site.name
        output.write(site, weight)
        done.append(site.name)
        tell(len(done), len(job.quantized))
        return SiteRecord(site.name, scheme.name, *errors.get(site.name, (0.0, 0.0)), rows=0)

    records = parallel_map(one, job.quantized)
    output.files.flush()
    return records


def _compared(job: Job, match: Match, coded: Mapping[str, Coded | None], directory: Path) -> dict[str, Any]:
    """Every weight of the result as it is read from the disk again, against that of the artefact."""
    ours, theirs = decoded(open_checkpoint(directory), read_config_json(directory)), job.model.checkpoint
    names_wider = set(match.wider)
    wider = {
        site.tensor: stored.scheme.arithmetic
        for site in job.quantized
        if site.name in names_wider and (stored := coded[site.tensor]) is not None
    }
    codes = {site.tensor for site in job.quantized}
    names = [name for name in theirs.tensors if name in ours.tensors]
    problems = []
    for name in names:
        old, new = theirs.read(name), ours.read(name)
        if name not in codes:
            old = _as_kept(job, theirs, name, old)
        elif name in wider:
            new = new.to(wider[name])
        if not torch.equal(new.to(old.dtype), old):
            problems.append(f"{name}: it is not the weight of the artefact any more")
    if problems or not codes <= set(names):
        problems += [f"{name}: it is not in the result" for name in sorted(codes - set(names))]
        raise VerificationError(f"{directory}: {'; '.join(problems[:_SHOWN])}: this is a fault of ours, please tell us")
    return {"codes_compared": len(codes), "codes_wider": len(wider), "kept_compared": len(names) - len(codes)}


def _as_kept(job: Job, checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
    """`tensor` there and back: a container may store a norm plus 1."""
    kept = job.container.kept(name, checkpoint.tensors[name])
    return tensor if kept is None else kept.decode(kept.encode(tensor))


def _errors(job: Job) -> dict[str, tuple[float, float]]:
    """What the record of the artefact says that its sites had lost, where it has one that says so."""
    sites = _record(job.model.path).get("sites")
    found: dict[str, tuple[float, float]] = {}
    for site in sites if isinstance(sites, list) else []:
        if isinstance(site, dict) and isinstance(site.get("name"), str):
            errors = (site.get("error"), site.get("error_nearest"))
            if all(type(error) is float for error in errors):
                found[site["name"]] = (float(errors[0]), float(errors[1]))  # type: ignore[arg-type]
    return found


def _origin(draft: Draft, coded: Mapping[str, Coded | None], match: Match) -> dict[str, Any]:
    """What was converted, for the record; the hashes of its files are the recipe's inputs."""
    record = _record(draft.model.path)
    return {
        "from": draft.model_name,
        "stored": draft.model.checkpoint.decoded_from,
        "schemes": {name: None if one is None else one.scheme.name for name, one in coded.items()},
        "recipe": record.get("recipe"),
        "kept": dict(match.lost),
        "computed_wider": list(match.wider),
    }


def _record(path: Path) -> dict[str, Any]:
    file = path / RECORD_NAME
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is damaged ({error}): remove it to convert without what it says") from error
    return found if isinstance(found, dict) else {}
