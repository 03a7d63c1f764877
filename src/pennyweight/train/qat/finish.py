"""A trained network -> its codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network import Network, QuantizedNetwork, fold_batch_norms
from pennyweight.models.network.network import with_weight
from pennyweight.train.qat.folded import folded_matrix
from pennyweight.train.qat.norms import reestimate_norms
from pennyweight.train.qat.prepared import (
    Preparation,
    activation_roundings,
    copied,
    preparation_of,
    prepared_norms,
    trained_sites,
    unwrapped,
)


def finish(model: nn.Module, *, calibration: Iterable[Any] | None = None) -> QuantizedNetwork:
    """The codes, scales and zero points with which `model`, from `prepare`, computes in eval mode; it is not changed.

    With `calibration`, batches of inputs, the statistics of batch norms are first estimated anew with the weights as
    they are now. Batch norms are folded. `finish(model).simulated()` computes what `model.eval()` does.
    Raises UsageError for another module, DataError where `calibration` yields nothing.
    """
    inner = unwrapped(model)
    if calibration is not None:
        inner = copied(inner)
        reestimate_norms(inner, calibration)
    preparation = preparation_of(inner)
    with torch.no_grad():
        network = _float(inner, preparation)
        weights = {
            trained.site.name: trained.rounding.quantized(trained.matrix, trained.rows)
            for trained in trained_sites(inner)
        }
        found = {name: module.parameters_ for name, module in activation_roundings(inner).items()}
    activations = {value: found[source] for value, source in preparation.sources.items() if source in found}
    return QuantizedNetwork(network, weights, activations, preparation.plan)


def _float(model: fx.GraphModule, preparation: Preparation) -> Network:
    """The network that is rounded, in float: with the trained tensors, batch norms folded as the model folds them."""
    network = preparation.network.copied()
    trained, mine = (dict(_tensors(graph)) for graph in (model, network.graph))
    for name, tensor in mine.items():
        if name in trained:
            tensor.copy_(trained[name])
    network.graph.eval()
    folded, norms = fold_batch_norms(network), prepared_norms(model)
    for name, path in preparation.folded.items():
        site, holder = folded.site(name), folded.graph.get_submodule(name)
        matrix, _ = folded_matrix(site.matrix(network.weight(site)), norms[path].factor)
        with_weight(site, folded.graph, site.tensor(matrix))
        bias: Any = network.graph.get_submodule(name).bias
        assert isinstance(holder.bias, nn.Parameter)
        holder.bias.copy_(norms[path].tensors.folded_bias(norms[path].factor, bias))
    return folded


def _tensors(graph: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all of their names."""
    yield from graph.named_parameters(remove_duplicate=False)
    yield from graph.named_buffers(remove_duplicate=False)
