"""What a prepared network remembers of how it was made, and how its parts are found."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.core.errors import UsageError
from pennyweight.models.network.network import Network, NetworkSite
from pennyweight.plan.plan import Plan
from pennyweight.train.qat.activations import ActivationRounding
from pennyweight.train.qat.folded import folded_matrix
from pennyweight.train.qat.statistics import BatchStatistics, NormTensors
from pennyweight.train.qat.weights import WeightRounding

_KEY = "pennyweight.prepared"


@dataclass(frozen=True)
class Preparation:
    """network    in float as it was, batch norms in it
    plan       scheme of each site and of each edge
    sources    edge -> the edge whose scale and zero point it has
    roundings  site -> path of its WeightRounding
    edges      edge that is no other's -> path of its ActivationRounding or DynamicRounding
    norms      path of a batch norm -> path of its BatchStatistics
    folded     site -> path of the batch norm that is folded into it
    """

    network: Network
    plan: Plan
    sources: Mapping[str, str]
    roundings: Mapping[str, str]
    edges: Mapping[str, str]
    norms: Mapping[str, str]
    folded: Mapping[str, str]


def remember(model: fx.GraphModule, preparation: Preparation) -> None:
    # Of a graph module only `meta` and what the graph names survive copy.deepcopy.
    model.meta[_KEY] = preparation


def unwrapped(model: nn.Module) -> fx.GraphModule:
    """The prepared network itself, of what torch.compile or DistributedDataParallel made of it. Raises UsageError."""
    inner: Any = model
    while isinstance(inner, nn.parallel.DistributedDataParallel | torch._dynamo.OptimizedModule):
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner._orig_mod
    if not isinstance(inner, fx.GraphModule) or _KEY not in inner.meta:
        raise UsageError(f"{type(model).__name__} was not made by pw.train.prepare: give what that returned")
    return inner


def copied(model: nn.Module) -> fx.GraphModule:
    """The same prepared network with tensors of its own."""
    with warnings.catch_warnings():
        # Of torch about how it copies the structure of inputs.
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(unwrapped(model))


def preparation_of(model: nn.Module) -> Preparation:
    found: Preparation = unwrapped(model).meta[_KEY]
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where its tensors are: all on one device."""
    return next(model.parameters()).device


@dataclass(frozen=True)
class PreparedNorm:
    """A batch norm of a prepared network with its tensors as they are now."""

    statistics: BatchStatistics
    tensors: NormTensors

    @property
    def factor(self) -> Tensor:
        return self.tensors.factor(self.statistics.epsilon)


def prepared_norms(model: nn.Module) -> dict[str, PreparedNorm]:
    """Path of each batch norm -> that norm."""
    inner = unwrapped(model)
    found = {}
    for path, place in preparation_of(inner).norms.items():
        statistics = inner.get_submodule(place)
        assert isinstance(statistics, BatchStatistics)
        found[path] = PreparedNorm(statistics, NormTensors.of(inner.get_submodule(path)))
    return found


@dataclass(frozen=True)
class TrainedSite:
    """A site of a prepared network with its tensors as they are now.

    matrix  [out, in], as it is rounded: gamma / sigma multiplied in where a batch norm is folded into it
    rows    |gamma / sigma| [out] of such a norm
    """

    site: NetworkSite
    rounding: WeightRounding
    matrix: Tensor
    rows: Tensor | None


def trained_sites(model: nn.Module) -> Iterator[TrainedSite]:
    """The sites that are rounded; gradients pass through their matrices to the weights, not to batch norms."""
    inner = unwrapped(model)
    preparation, norms = preparation_of(inner), prepared_norms(inner)
    for site in preparation.network.sites:
        if site.name not in preparation.roundings:
            continue
        rounding = inner.get_submodule(preparation.roundings[site.name])
        assert isinstance(rounding, WeightRounding)
        matrix, rows = site.matrix(inner.get_parameter(site.parameter)), None
        if site.name in preparation.folded:
            matrix, rows = folded_matrix(matrix, norms[preparation.folded[site.name]].factor.detach())
        yield TrainedSite(site, rounding, matrix, rows)


def activation_roundings(model: nn.Module) -> dict[str, ActivationRounding]:
    """Edge that is no other's -> its rounding, of those whose steps are learnt."""
    inner = unwrapped(model)
    modules = {name: inner.get_submodule(path) for name, path in preparation_of(inner).edges.items()}
    return {name: module for name, module in modules.items() if isinstance(module, ActivationRounding)}
