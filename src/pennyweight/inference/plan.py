"""Which parameters of a model get packed weights, and what becomes of quantized weights that cannot be packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from pennyweight.kernels.packed import PackedMatrix
from pennyweight.models.base import Checkpoint
from pennyweight.models.decoders.base import Coded
from pennyweight.models.sites import Place, find_sites
from pennyweight.models.skeleton import find_blocks
from pennyweight.models.weight_map import WeightMap
from pennyweight.schemes import QuantizedWeight


@dataclass
class PackingPlan:
    """matrices: parameter of a linear map or an embedding -> tensor of the checkpoint that it gets packed;
    stacks: 3-D parameter -> the tensors of each expert, in the order of their rows;
    decoded: quantized tensor -> why it is not packed."""

    matrices: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, list[list[str]]] = field(default_factory=dict)
    decoded: dict[str, str] = field(default_factory=dict)


def plan_packing(model: nn.Module, weights: WeightMap, checkpoint: Checkpoint,
                 coded: Mapping[str, Coded | None]) -> PackingPlan:  # fmt: skip
    """Decided by the modules that have the parameters; `coded` are the quantized tensors of `checkpoint`."""
    plan = PackingPlan()
    refused = {key: why for key, one in coded.items() if (why := _why_not(checkpoint, key, one)) is not None}
    owners = parameter_owners(model)
    stacks: dict[str, list[list[str]]] | None = None
    for name, source in weights.sources.items():
        quantized = [key for key in source.keys if key in coded]
        packable = [key for key in quantized if key not in refused]
        if packable and source.converter is None and all(takes_packed(*owner) for owner in owners.get(name, [])):
            plan.matrices[name] = source.keys[-1]
            continue
        if packable and source.converter is not None:
            stacks = _stacks(model, weights) if stacks is None else stacks
            if name in stacks:
                plan.stacks[name] = stacks[name]
                packable = []
        plan.decoded.update({key: refused.get(key) or f"{name} is not the matrix of a linear map" for key in packable})
        plan.decoded.update({key: refused[key] for key in quantized if key in refused})
    return plan


def parameter_owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name of a parameter -> the modules that have it, with their names for it; all that are tied to each other."""
    by_id: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            by_id.setdefault(id(parameter), []).append((module, attribute))
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def takes_packed(module: nn.Module, attribute: str) -> bool:
    """Whether it is the weight of a module that computes what nn.Linear does, or a look-up without more."""
    if attribute != "weight":
        return False
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward and module.max_norm is None
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _stacks(model: nn.Module, weights: WeightMap) -> dict[str, list[list[str]]]:
    """3-D parameter -> the tensors of each expert, where each tensor is one matrix, or rows of one."""
    found = find_sites(model, find_blocks(model), weights)
    placed: dict[str, list[tuple[int, int, str]]] = {}
    for site in found.sites:
        place: Place = found.places[site.name]
        if site.kind == "expert" and site.index is None and place.index is not None and not place.transposed:
            first = 0 if place.rows is None else place.rows[0]
            placed.setdefault(place.parameter, []).append((place.index, first, site.tensor))
    return {name: _by_expert(sorted(each)) for name, each in placed.items()}


def _by_expert(placed: Sequence[tuple[int, int, str]]) -> list[list[str]]:
    experts: list[list[str]] = [[] for _ in range(placed[-1][0] + 1)]
    for index, _, key in placed:
        experts[index].append(key)
    return experts


def _why_not(checkpoint: Checkpoint, key: str, coded: Coded | None) -> str | None:
    if coded is None:
        return "no scheme says how it is stored"
    rows, cols = checkpoint.tensors[key].shape
    why = PackedMatrix.why_not(rows, cols, group=coded.scheme.group_size(cols))
    return None if why is None else f"{coded.scheme}: {why}"


def packed(weight: QuantizedWeight) -> PackedMatrix:
    """The same weight as kernels read it. Scales that are codes are decoded; a parent of all of them stays apart."""
    scheme = weight.scheme
    given = weight.parameters.decoded(scheme)
    scales, unit = given.scales, 1.0
    spec = scheme.scale
    if weight.parents is not None and spec.span is None and spec.element is not None:
        scales, unit = spec.element.decode(weight.scales), float(weight.parents)
    zeros = weight.zeros if scheme.has_integer_zero else given.zeros
    return PackedMatrix.pack(
        weight.codes, scales, element=scheme.element, zeros=zeros, offsets=given.offsets, unit=unit
    )
