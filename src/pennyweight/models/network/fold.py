"""Batch norms of the running statistics are part of the convolution before them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn

from pennyweight.models.network.network import Network, NetworkSite, module_calls

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def foldable(network: Network) -> dict[str, NetworkSite]:
    """Node of a batch norm -> the site that computes its input and nothing else, called once."""
    calls = Counter(str(node.target) for node, _ in module_calls(network.graph))
    makers = {
        name: site for site in network.sites for name in site.nodes if site.kind not in ("embedding", "recurrent")
    }
    found: dict[str, NetworkSite] = {}
    for node, module in module_calls(network.graph):
        source = node.args[0] if node.args else None
        if not isinstance(module, NORMS) or not isinstance(source, fx.Node) or source.name not in makers:
            continue
        # Without running statistics it is no line.
        if module.running_mean is None:
            continue
        site = makers[source.name]
        is_alone = len(source.users) == 1 and len(site.nodes) == 1 and not site.tied and calls[str(node.target)] == 1
        # The channels of a linear map are its last axis, those of a convolution the first but for the batch.
        axes = len(site.shape)
        if is_alone and getattr(source.meta.get("val"), "ndim", axes) == axes:
            found[node.name] = site
    return found


def fold_batch_norms(network: Network) -> Network:
    """The same function with batch norms behind convolutions and linear maps folded into them:

        W' = W gamma / sqrt(var + eps),  b' = beta + (b - mean) gamma / sqrt(var + eps),  in float64

    A batch norm whose input has other readers, or that no single site makes, stays.
    """
    folded = network.copied()
    graph = folded.graph
    nodes = {node.name: node for node in graph.graph.nodes}
    for name, site in foldable(folded).items():
        node = nodes[name]
        norm, maker = graph.get_submodule(str(node.target)), graph.get_submodule(site.name)
        assert isinstance(norm, NORMS)
        _fold(site, maker, *norm_as_line(norm))
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
        graph.delete_submodule(str(node.target))
    graph.graph.lint()
    graph.recompile()
    return folded


def _fold(site: NetworkSite, maker: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Let `maker` give scale y + shift in place of y."""
    old, bias = maker.weight, maker.bias
    assert isinstance(old, Tensor)
    with torch.no_grad():
        weight = site.tensor(site.matrix(old.double()) * scale[:, None])
        moved = shift + bias.double() * scale if isinstance(bias, Tensor) else shift
        # In place: the tensor may have a second name in the graph.
        old.copy_(weight)
        maker.bias = nn.Parameter(moved.to(old.dtype), requires_grad=old.requires_grad)


def norm_as_line(norm: Norm) -> tuple[Tensor, Tensor]:
    """float64 scale and shift [channels] with which a batch norm in eval mode gives scale x + shift."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance.double() + norm.eps)
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = -mean.double() * scale
    return scale, shift + norm.bias.detach().double() if norm.affine else shift
