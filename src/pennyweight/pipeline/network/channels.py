"""Which channels of a network may be scaled, and which must be scaled alike.

The operations between sites are run on names in place of numbers: an element's name says whose scale it carries. What
only moves numbers moves names, what is positively homogeneous (f(x / s) = f(x) / s for s > 0) keeps them, a sum makes
the names of its terms one, and anything else lets no scale through: those names are fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from pennyweight.models.network.identity import is_identity, name_of
from pennyweight.models.network.lift import bound_arguments
from pennyweight.models.network.network import Inputs, Network, NetworkSite
from pennyweight.models.network.part import leaves_of
from pennyweight.pipeline.network.names import FIXED, ZERO, Names

_MOVES = frozenset(
    {
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "squeeze",
        "unsqueeze", "slice", "select", "narrow", "expand", "expand_as", "repeat", "cat", "concat", "stack", "chunk",
        "split", "split_with_sizes", "unbind", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "roll", "flip",
        "index_select", "getitem",
    }
)  # fmt: skip
_ALIKE = frozenset(
    {
        "relu", "leaky_relu", "prelu", "abs", "neg", "clone", "contiguous", "detach", "alias", "to", "_to_copy",
        "dropout", "identity",
    }
)  # fmt: skip
# What they put together lies along the last axes.
_POOLS = {
    f"{kind}{axes}d": axes
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "upsample_nearest", "upsample_linear",
                 "upsample_bilinear", "upsample_bicubic", "upsample_trilinear")
    for axes in (1, 2, 3)
}  # fmt: skip
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})
_TERMS = frozenset({"add", "sub", "maximum", "minimum"})
_PRODUCTS = frozenset({"mul", "div"})
_CLIPS = {"relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0), "clamp": (None, None), "clamp_min": (None, None)}
# Enough of a batch to see its axis.
_BATCH = 2


@dataclass(frozen=True)
class SiteChannels:
    """rows     int64 [out]: the number of the channel that each row of the site's matrix makes, 0 for a fixed one
    columns  int64 [groups, in]: of the channel that each column reads
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Channels:
    """sites  those whose channels are known; the others must stay as they are
    count  of numbers, 0 included
    fixed  site -> why channels that it makes are fixed, where some are
    """

    sites: Mapping[str, SiteChannels]
    count: int
    fixed: Mapping[str, str]


def channels_of(network: Network, *, unclipped: Collection[str] = ()) -> Channels:
    """What may be scaled; values in `unclipped` are cut off by an upper bound that they never reach."""
    try:
        return _Walk(network, unclipped).found(_small(network.example))
    except (RuntimeError, AssertionError):
        # The graph wants the size of its example.
        return _Walk(network, unclipped).found(network.example)


def clip_of(node: fx.Node) -> tuple[float, float] | None:
    """The bounds of an operation that cuts its values off, infinite where there is none."""
    name = name_of(node)
    if name not in _CLIPS:
        return None
    low, high = _CLIPS[name]
    given = bound_arguments(node)
    low, high = given.get("min_val", given.get("min", low)), given.get("max_val", given.get("max", high))
    bounds = (-torch.inf if low is None else low, torch.inf if high is None else high)
    return bounds if all(isinstance(bound, int | float) for bound in bounds) else None


def _small(example: Inputs) -> Inputs:
    def cut(value: Any) -> Any:
        return value[:_BATCH] if isinstance(value, Tensor) and value.dim() else value

    return Inputs(*pytree.tree_map(cut, (example.args, dict(example.kwargs))))


def _fixed_like(value: Any) -> Any:
    return pytree.tree_map(
        lambda part: torch.full((), FIXED).expand(part.shape) if isinstance(part, Tensor) else part, value
    )


class _Walk(fx.Interpreter):
    """Runs the network on its example, and beside each value its names."""

    def __init__(self, network: Network, unclipped: Collection[str]) -> None:
        super().__init__(network.graph, garbage_collect_values=True)
        self._network, self._unclipped = network, frozenset(unclipped)
        self._names = Names()
        # Of the values that are still held; numbers stand for themselves.
        self._held: dict[fx.Node, Any] = {}
        self._sites = {node: site for site in network.sites for node in site.nodes}
        self._seen: dict[str, SiteChannels] = {}
        biases = [
            getattr(network.graph.get_submodule(site.name), "bias", None) for site in network.sites if _has_rows(site)
        ]
        self._biases = Counter(id(bias) for bias in biases if bias is not None)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._held[n] = self._names_of(n, value)
        for done in self.user_to_last_uses.get(n, ()):
            self._held.pop(done, None)
        return value

    def found(self, inputs: Inputs) -> Channels:
        """What a run on `inputs` shows."""
        with torch.no_grad():
            self.run(*leaves_of(self._network, inputs), enable_io_processing=False)
        sites = [(name, each) for name, each in self._seen.items()]
        tensors, count = self._names.numbered([names for _, each in sites for names in (each.rows, each.columns)])
        numbered = {
            name: SiteChannels(rows, columns)
            for (name, _), rows, columns in zip(sites, tensors[::2], tensors[1::2], strict=True)
        }
        reasons = {name: [self._names.why(row) for row in each.rows.tolist()] for name, each in sites}
        fixed = {name: next(why for why in whys if why) for name, whys in reasons.items() if any(whys)}
        return Channels(numbered, count, fixed)

    def _names_of(self, node: fx.Node, value: Any) -> Any:
        if node.name in self._sites:
            return self._site(node, self._sites[node.name], value)
        name = name_of(node)
        given = [self._held[one] for one in node.all_input_nodes]
        # What only asserts something of its input has no value.
        if value is None or not any(isinstance(part, Tensor) for part in pytree.tree_leaves(given)):
            return _fixed_like(value)
        if isinstance(value, Tensor) and not value.is_floating_point():
            return self._stopped(node, value, f"{node.name} ({name or node.target}) makes whole numbers of them")
        if name in _MOVES:
            return self._moved(node)
        if name == "pad":
            return self._padded(node, value)
        if name in _ALIKE or is_identity(node) or self._is_open(node):
            return given[0]
        if name in _POOLS or name in _REDUCTIONS:
            return self._pooled(node, name, given[0], value)
        if name in _TERMS:
            return self._sum(node, value)
        if name in _PRODUCTS:
            return self._product(node, name, value)
        why = f"{node.name} ({name or node.target}) " + (
            "cuts its values off" if name in _CLIPS else "lets no scale through"
        )
        return self._stopped(node, value, "it goes out of the network" if node.op == "output" else why)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._network.graph.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _stopped(self, node: fx.Node, value: Any, why: str) -> Any:
        for names in pytree.tree_leaves([self._held[one] for one in node.all_input_nodes]):
            if isinstance(names, Tensor):
                self._names.fix(names, why)
        return _fixed_like(value)

    def _site(self, node: fx.Node, site: NetworkSite, value: Any) -> Any:
        bias = getattr(self._module(node), "bias", None)
        if not _has_rows(site) or site.tied or self._biases[id(bias)] > 1:
            return self._stopped(node, value, f"{site.name} stays as it is")
        given = self._held[node.all_input_nodes[0]]
        axis = given.dim() - 1 if site.kind == "linear" else given.dim() - len(site.shape) + 1
        read = self._names.alike(given.movedim(axis, 0).flatten(1), f"{site.name} reads constants beside it")
        kernel = 1 if site.kind == "linear" else prod(site.shape[2:])
        columns = read.clamp_min(FIXED).reshape(site.groups, -1).repeat_interleave(kernel, 1)
        known = self._seen.get(site.name)
        if known is None:
            known = self._seen[site.name] = SiteChannels(self._names.fresh(site.matrix_shape[0]), columns)
        else:
            self._names.joined(known.columns, columns, f"{site.name} is called again")
        shape = [1] * value.dim()
        shape[axis] = -1
        return known.rows.reshape(shape).expand(value.shape)

    def _moved(self, node: fx.Node) -> Any:
        # What says where numbers go is taken for what it is.
        values = {one: self.env[one] if _is_index(self.env[one]) else self._held[one] for one in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        # Names do not lie in memory as the values do: what is a view of these may have to be copied.
        target = torch.ops.aten.reshape.default if name_of(node) == "view" else node.target
        assert callable(target)
        return target(*args, **kwargs)

    def _padded(self, node: fx.Node, value: Tensor) -> Any:
        given = bound_arguments(node)
        names: Tensor = self._held[node.all_input_nodes[0]]
        if given.get("mode", "constant") != "constant":
            # Numbers are repeated; there is no such operation for integers.
            return torch.ops.aten.pad.default(names.double(), given["pad"], given["mode"]).long()
        if given["value"]:
            return self._stopped(node, value, f"{node.name} puts {given['value']} around it")
        return torch.ops.aten.pad.default(names, given["pad"], "constant", ZERO)

    def _is_open(self, node: fx.Node) -> bool:
        """A clip that is none: at 0 below, and above nowhere, or nowhere that is reached."""
        bounds = clip_of(node)
        return bounds is not None and bounds[0] == 0 and (bounds[1] == torch.inf or node.name in self._unclipped)

    def _pooled(self, node: fx.Node, name: str, names: Tensor, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return self._stopped(node, value, f"{node.name} ({name}) lets no scale through")
        axes = range(-_POOLS[name], 0) if name in _POOLS else bound_arguments(node).get("dim")
        every = range(names.dim())
        gone = sorted({axis % names.dim() for axis in ([axes] if isinstance(axes, int) else axes or every)})
        kept = [axis for axis in every if axis not in gone]
        moved = names.permute(*kept, *gone)
        shape = moved.shape[: len(kept)]
        one = self._names.alike(moved.reshape(prod(shape), -1), f"{node.name} adds up what has other scales")
        if name in _POOLS or bound_arguments(node).get("keepdim"):
            back = [axis if axis in kept else None for axis in every]
            whole = one.reshape(shape)
            for axis, at in enumerate(back):
                whole = whole.unsqueeze(axis) if at is None else whole
            return whole.expand(value.shape)
        return one.reshape(value.shape)

    def _sum(self, node: fx.Node, value: Tensor) -> Any:
        terms = [part for part in node.args[:2] if isinstance(part, fx.Node)]
        why = f"{node.name} adds a constant"
        if len(terms) < 2 or not all(isinstance(self._held[term], Tensor) for term in terms):
            return self._stopped(node, value, why)
        return self._names.joined(self._held[terms[0]], self._held[terms[1]], why)

    def _product(self, node: fx.Node, name: str, value: Tensor) -> Any:
        """One factor may carry a scale: the numerator, or whichever it is."""
        factors = [self._held[part] for part in node.args[:2] if isinstance(part, fx.Node)]
        scaled = [part for part in factors if isinstance(part, Tensor) and not self._names.are_fixed(part)]
        is_first = len(factors) < 2 or name == "mul" or (scaled and scaled[0] is factors[0])
        if len(scaled) != 1 or not is_first or not isinstance(node.args[0], fx.Node):
            return self._stopped(node, value, f"{node.name} ({name}) multiplies two of them")
        return scaled[0].expand(value.shape)


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def _has_rows(site: NetworkSite) -> bool:
    return site.kind in ("linear", "conv", "conv_transpose")
