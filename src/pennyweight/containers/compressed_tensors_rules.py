"""What compressed-tensors cannot hold, and what transformers 5.23 or vLLM refuse or would load wrongly, in sentences.

tests/containers/test_compressed_tensors_rows.py opens files that break these rules to see that they are still true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

from pennyweight.containers.base import ModelFacts
from pennyweight.containers.compressed_tensors_floats import BFLOAT16_ONLY, layout_of
from pennyweight.formats.integer import Int
from pennyweight.models.base import Site
from pennyweight.plan.plan import Plan
from pennyweight.schemes import PerChannel, PerGroup, PerTensor, Scheme

SiteRule = Callable[[Scheme, Site], str | None]
PlanRule = Callable[[Plan, Sequence[Site]], str | None]

# The group sizes of vLLM's Marlin kernels; one scale per channel is their -1.
_MARLIN_GROUPS = (32, 64, 128)
# Linears that vLLM merges into one: each tuple lives or dies under one scheme.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))
_FUSED_WITH = {member: members for members in _FUSED for member in members}


def site_refusal(scheme: Scheme, site: Site, *, runtime: str) -> str | None:
    """Why `runtime` cannot read `scheme` for `site` from this container, or None."""
    rules: tuple[SiteRule, ...] = (_embedding, _format, _storage, _groups)
    rules = (*rules, _vllm_head, _vllm_floats, _marlin) if runtime == "vllm" else (*rules, _float_experts)
    return next((reason for rule in rules if (reason := rule(scheme, site)) is not None), None)


def plan_refusal(plan: Plan, sites: Sequence[Site], facts: ModelFacts, *, runtime: str) -> str | None:
    """Why `runtime` cannot read the whole plan, or None."""
    if not plan.schemes:
        return "no site has a scheme: there is nothing to write; the float model is already what would be written"
    reason = _scale_type(plan, facts) or _decoded_type(plan, facts)
    if reason is not None:
        return reason
    rules: tuple[PlanRule, ...] = (_fused,) if runtime == "vllm" else (_experts, _mixed_with_zeros)
    return next((reason for rule in rules if (reason := rule(plan, sites)) is not None), None)


# ---- one site


def _format(scheme: Scheme, site: Site) -> str | None:
    if layout_of(scheme) is not None:
        return None
    element = scheme.element
    if scheme.computed is not None:
        return (
            f"{site.name}: {scheme} given, which is computed in {scheme.computed}; compressed-tensors computes in the "
            "type of the scales: use a scheme that names no other, like int4-g128"
        )
    if isinstance(element, Int) and scheme.is_plain:
        return (
            f"{site.name}: {scheme} given; compressed-tensors packs signed integers of 2 to 8 bits only: "
            f"use int{element.bits}, with -asym where the weights lie on one side of zero"
        )
    return (
        f"{site.name}: {scheme} given; compressed-tensors has no layout for it, only for signed integers with float "
        "scales and integer zero points, fp8_e4m3-channel, fp8_e4m3-tensor, mxfp8, mxfp4 and nvfp4: use one of these"
    )


def _embedding(scheme: Scheme, site: Site) -> str | None:
    if site.kind != "embedding":
        return None
    return f"{site.name}: transformers and vLLM read a quantized embedding wrongly: keep it in float"


def _float_experts(scheme: Scheme, site: Site) -> str | None:
    if site.kind != "expert" or layout_of(scheme) not in BFLOAT16_ONLY:
        return None
    return (
        f"{site.name}: {scheme} given; transformers decodes experts as packed integers or plain fp8 only: "
        "use integers or fp8_e4m3-channel for the experts"
    )


def _storage(scheme: Scheme, site: Site) -> str | None:
    if site.index is not None or site.rows is not None:
        return (
            f"{site.name}: the checkpoint keeps its experts together in {site.tensor}; transformers reads packed "
            "experts only where the checkpoint stores each under its own name: these experts "
            "stay in float"
        )
    if site.transposed or site.kind == "conv1d":
        return (
            f"{site.name}: GPT-2's weights are stored transposed (Conv1D, [in, out]), and transformers leaves a packed "
            "Conv1D at random values; compressed-tensors packs Linear weights only, so this "
            "layer stays in float"
        )
    return None


def _groups(scheme: Scheme, site: Site) -> str | None:
    inputs = site.shape[1]
    if not isinstance(scheme.granularity, PerGroup) or inputs % scheme.granularity.size == 0:
        return None
    return (
        f"{site.name}: {inputs} inputs cannot be split into groups of {scheme.granularity.size}; the group size must "
        f"divide the inputs: use a divisor of {inputs}, or one scale per channel"
    )


def _vllm_head(scheme: Scheme, site: Site) -> str | None:
    if site.kind != "head":
        return None
    return (
        f"{site.name}: vLLM reads a packed output head since its pull request 37291 only, and that is not proved: "
        "keep the head in float, or write for transformers"
    )


def _vllm_floats(scheme: Scheme, site: Site) -> str | None:
    is_fp8_channel = layout_of(scheme) == "float-quantized" and isinstance(scheme.granularity, PerChannel)
    if isinstance(scheme.element, Int) or is_fp8_channel:
        return None
    said = "vLLM takes one global scale for all that it merges, and would decode the others wrongly"
    if scheme.scale.parent is None:
        said = "this layout has not been proved with vLLM's weight-only kernels"
    return f"{site.name}: {scheme} given; {said}: use integers or fp8_e4m3-channel"


def _marlin(scheme: Scheme, site: Site) -> str | None:
    bits = scheme.element.bits
    if not isinstance(scheme.element, Int):
        return None
    if bits not in (4, 8):
        return f"{site.name}: {scheme} given; vLLM runs packed integers of 4 and 8 bits only: use int4 or int8"
    if scheme.zero is not None and bits != 4:
        return f"{site.name}: {scheme} given; vLLM's kernels take zero points at 4 bits only: drop -asym, or use int4"
    if isinstance(scheme.granularity, PerTensor):
        return f"{site.name}: {scheme} given; vLLM takes one scale per channel or per group: use int{bits}-channel"
    if isinstance(scheme.granularity, PerGroup) and scheme.granularity.size not in _MARLIN_GROUPS:
        return (
            f"{site.name}: groups of {scheme.granularity.size} given; vLLM's Marlin kernels take groups of 32, 64 or "
            f"128 or one scale per channel: use one of these"
        )
    return None


# ---- the plan


def _scale_type(plan: Plan, facts: ModelFacts) -> str | None:
    for name, scheme in plan.schemes.items():
        if scheme.scale.element is None and scheme.scale.dtype != facts.dtype:
            return (
                f"{name}: {scheme.scale.dtype} scales in a {facts.dtype} model would be cast to {facts.dtype} when "
                f"loaded and decode to other weights: use {facts.dtype} scales (leave the scale type out of the scheme)"
            )
    return None


def _decoded_type(plan: Plan, facts: ModelFacts) -> str | None:
    """What only ever decodes to bfloat16 needs to be decoded while loading, where that is not the model's type."""
    if facts.dtype == "bfloat16" or len(set(plan.schemes.values())) < 2:
        return None
    for name, scheme in plan.schemes.items():
        if layout_of(scheme) in BFLOAT16_ONLY:
            return (
                f"{name}: {scheme} given; compressed-tensors decodes it to bfloat16, which a {facts.dtype} model takes "
                "only where all layers have one scheme: use one scheme, or no mxfp8, mxfp4 and nvfp4"
            )
    return None


def _experts(plan: Plan, sites: Sequence[Site]) -> str | None:
    """transformers decodes all experts of a model with one scheme, without zero points, and drops those in float."""
    experts = [site for site in sites if site.kind == "expert" and site.index is None]
    chosen = [plan.schemes.get(site.name) for site in experts]
    for site, scheme in zip(experts, chosen, strict=True):
        if scheme is None:
            return (
                f"{site.name}: this expert stays in float, but once any layer is packed transformers loads experts "
                "only if all of them are: give every expert the same symmetric scheme"
            )
        if scheme.zero is not None:
            return (
                f"{site.name}: {scheme} given; transformers decodes packed experts without zero points: "
                "use a symmetric scheme for the experts"
            )
        if chosen[0] is not None and scheme != chosen[0]:
            return (
                f"{site.name} has {scheme} and {experts[0].name} has {chosen[0]}; transformers decodes the experts of "
                "all layers with one scheme and would load the others wrongly: give every expert the same scheme"
            )
    return None


def _mixed_with_zeros(plan: Plan, sites: Sequence[Site]) -> str | None:
    names = list(dict.fromkeys(str(scheme) for scheme in plan.schemes.values()))
    if len(names) < 2 or all(scheme.zero is None for scheme in plan.schemes.values()):
        return None
    return (
        f"{' and '.join(names)} given; transformers loads zero points only by decoding every layer with one and the "
        "same scheme, and would load the others wrongly: use one scheme for all layers, or symmetric ones"
    )


def _fused(plan: Plan, sites: Sequence[Site]) -> str | None:
    for members in fused_sites(sites, runtime="vllm"):
        for member in members[1:]:
            reason = _differ(plan, members[0], member)
            if reason is not None:
                return reason
    return None


def fused_sites(sites: Sequence[Site], *, runtime: str) -> list[tuple[str, ...]]:
    """Sites that `runtime` gives one scheme: transformers all experts of the model, vLLM those of a block and the
    linears that it merges."""
    if runtime != "vllm":
        experts = tuple(site.name for site in sites if site.kind == "expert")
        return [experts] if len(experts) > 1 else []
    return [*_merged_linears(sites), *(members for members in _experts_by_block(sites) if len(members) > 1)]


def _merged_linears(sites: Sequence[Site]) -> Iterator[tuple[str, ...]]:
    names = {site.name for site in sites if site.kind != "expert"}
    for name in (site.name for site in sites if site.name in names):
        parent, _, leaf = name.rpartition(".")
        members = tuple(other for one in _FUSED_WITH.get(leaf, ()) if (other := f"{parent}.{one}") in names)
        if len(members) > 1 and name == members[0]:
            yield members


def _experts_by_block(sites: Sequence[Site]) -> Iterator[tuple[str, ...]]:
    experts = sorted((site for site in sites if site.kind == "expert"), key=lambda site: site.block)
    for _, members in groupby(experts, key=lambda site: site.block):
        yield tuple(site.name for site in members)


def _differ(plan: Plan, one: str, other: str) -> str | None:
    mine, theirs = _named(plan.schemes, one), _named(plan.schemes, other)
    if plan.schemes.get(one) == plan.schemes.get(other):
        return None
    return (
        f"{one} has {mine} and {other} has {theirs}; vLLM merges the two into one matrix: "
        "give both the same scheme, or keep both in float"
    )


def _named(schemes: Mapping[str, Scheme], site: str) -> str:
    return str(schemes[site]) if site in schemes else "float"
