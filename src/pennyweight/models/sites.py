"""The sites of a model: what can be quantized, and where each one lives in the module."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from torch import Tensor, nn

from pennyweight.models.base import Site, SiteKind
from pennyweight.models.weight_map import Source, WeightMap


@dataclass(frozen=True)
class Place:
    """Where a site's matrix is inside the model: a parameter, or rows of one slice of a 3-D parameter."""

    parameter: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix as a view [out, in] of `parameter`'s memory."""
        matrix = parameter if self.index is None else parameter[self.index]
        matrix = matrix.T if self.transposed else matrix
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    @property
    def is_whole(self) -> bool:
        """The matrix is the parameter itself."""
        return self.index is None and self.rows is None and not self.transposed


@dataclass(frozen=True)
class Sites:
    """sites in the order of the model, their places, and matrices that cannot be sites, with the reason."""

    sites: list[Site]
    places: dict[str, Place]
    refused: dict[str, str]


def find_sites(model: nn.Module, blocks: list[str], weights: WeightMap) -> Sites:
    """Linear maps inside the blocks: nn.Linear, transformers' Conv1D, and experts kept as 3-D parameters.

    Routers are left out: a linear map beside the experts with one output an expert, or one output.
    """
    found = Sites([], {}, {})
    for number, block in enumerate(blocks):
        first = len(found.sites)
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                if not _is_router(model, block, path):
                    _add_matrix(found, path, module, number, weights)
            elif _names_experts(module, path):
                _add_experts(found, path, module, number, weights)
        _note_others(found, model, block, max((site.weights for site in found.sites[first:]), default=0))
    return found


def _note_others(found: Sites, model: nn.Module, block: str, largest: int) -> None:
    """Matrices as large as the block's largest site that are none themselves are named: too much to pass over."""
    owned = {place.parameter for place in found.places.values()}
    for path, parameter in model.get_submodule(block).named_parameters(prefix=block):
        known = path in owned or path in found.refused or path.removesuffix(".weight") in found.refused
        if parameter.ndim > 1 and parameter.numel() >= max(largest, 1) and not known:
            found.refused[path] = "it is not kept as the matrix of a linear map"


def _is_router(model: nn.Module, block: str, path: str) -> bool:
    """A linear map beside the experts of its block, with one output an expert, or one: it chooses, it doesn't carry."""
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        return False
    for name, experts in model.get_submodule(block).named_modules(prefix=block):
        parent = name.rpartition(".")[0]
        if not _holds_experts(experts, name) or not path.startswith(f"{parent}.") or path.startswith(f"{name}."):
            continue
        below = path.removeprefix(f"{parent}.").split(".")
        named = any(word in part for part in below for word in ("router", "gate"))
        if module.out_features in (1, _count(experts)) and (named or len(below) == 1):
            return True
    return False


def _holds_experts(module: nn.Module, path: str) -> bool:
    stacked = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    return (isinstance(module, nn.ModuleList) and path.endswith("experts")) or (
        _names_experts(module, path) and stacked
    )


def _names_experts(module: nn.Module, path: str) -> bool:
    return path.endswith("experts") or "Experts" in type(module).__name__ or hasattr(module, "is_transposed")


def _count(experts: nn.Module) -> int:
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    return next(parameter.shape[0] for parameter in experts.parameters(recurse=False) if parameter.ndim == 3)


def _add_matrix(found: Sites, path: str, module: nn.Module, block: int, weights: WeightMap) -> None:
    parameter = f"{path}.weight"
    source = weights.sources.get(parameter)
    shape = module.get_parameter("weight").shape
    if source is None:
        found.refused[path] = "it shares its weight with another module"
        return
    if source.converter is not None or not source.keys[0].endswith(".weight"):
        found.refused[path] = f"its weight is made from {', '.join(source.keys[:3])} while loading"
        return
    transposed = not isinstance(module, nn.Linear)
    kind: SiteKind = "conv1d" if transposed else ("expert" if ".experts." in path else "linear")
    out, inputs = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    name = source.keys[0].removesuffix(".weight")
    found.sites.append(Site(name, (out, inputs), block, kind, source.keys[0], transposed=transposed))
    found.places[name] = Place(parameter, transposed=transposed)


def _add_experts(found: Sites, path: str, module: nn.Module, block: int, weights: WeightMap) -> None:
    transposed = _is_transposed(module)
    for name, parameter in module.named_parameters(recurse=False):
        source = weights.sources.get(f"{path}.{name}")
        if parameter.ndim != 3 or source is None:
            continue
        if transposed is None:
            found.refused[f"{path}.{name}"] = "how its experts are stored cannot be seen, as [out, in] or as [in, out]"
            continue
        sites = _expert_sites(f"{path}.{name}", parameter, block, source, transposed=transposed)
        found.sites.extend(site for site, _ in sites)
        found.places.update({site.name: place for site, place in sites})
        if not sites:
            found.refused[f"{path}.{name}"] = (
                f"its experts are made from {source.keys[0]} in a way that is not known here"
            )


def _is_transposed(module: nn.Module) -> bool | None:
    """Whether experts are kept as [in, out]: what transformers notes, else what the module calls; None if unknown."""
    noted = getattr(module, "is_transposed", None)
    if isinstance(noted, bool):
        return noted
    try:
        code = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return None
    calls_linear = re.search(r"\blinear\(", code) is not None
    multiplies = re.search(r"\b(bmm|matmul)\(", code) is not None
    return multiplies if calls_linear != multiplies else None


def kind_of_merge(source: Source) -> str | None:
    """How a 3-D parameter comes about: "stored" as it is, "stacked" from matrices, or None where we don't know."""
    if source.converter is None:
        return "stored"
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in source.converter.operations]
    return "stacked" if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) else None


def _expert_sites(
    path: str, parameter: Tensor, block: int, source: Source, *, transposed: bool
) -> list[tuple[Site, Place]]:
    experts, first, second = parameter.shape
    shape = (second, first) if transposed else (first, second)
    merge = kind_of_merge(source)
    if merge == "stored":
        key = source.keys[0]
        return [
            (
                Site(f"{key}.{index}", shape, block, "expert", key, index=index, transposed=transposed),
                Place(path, index, transposed=transposed),
            )
            for index in range(experts)
        ]
    if merge is None or transposed:
        return []
    patterns = list(source.converter.source_patterns)
    height = first // len(patterns)
    found: list[tuple[Site, Place]] = []
    seen = dict.fromkeys(patterns, 0)
    for key, pattern in zip(source.keys, source.patterns, strict=True):
        start = patterns.index(pattern) * height
        rows = None if len(patterns) == 1 else (start, start + height)
        site = Site(key.removesuffix(".weight"), (height, second), block, "expert", key)
        found.append((site, Place(path, seen[pattern], rows)))
        seen[pattern] += 1
    return found
