"""Operations that write into their argument become those that give a new tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pennyweight.core.errors import ModelError

# These give another view of their argument's memory.
_VIEWS = frozenset(
    {
        "view", "reshape", "transpose", "permute", "t", "flatten", "squeeze", "unsqueeze", "slice", "select", "expand",
        "narrow", "chunk", "split", "unbind", "detach", "alias", "contiguous", "getitem", "dropout", "to",
    }
)  # fmt: skip


def without_mutation(graph: fx.GraphModule) -> None:
    """Edit `graph`: relu_(x) becomes relu(x), and whoever read x after it reads the result.

    Raises ModelError for a node that writes into part of another tensor, or into one that has views elsewhere.
    """
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not _mutates(node.target):
            continue
        written, plain = node.args[0], _plain(node.target)
        if plain is None or not isinstance(written, fx.Node) or _has_views(written):
            raise ModelError(
                f"{node.name} ({node.target}) writes into a tensor that others see: use the operation without the "
                "underscore, or torch.cat, torch.where or index_put in place of an assignment to a part"
            )
        node.target = plain
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
    graph.graph.lint()
    graph.recompile()


def _mutates(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _plain(target: Any) -> Any:
    """aten.relu_.default -> aten.relu.default; None where there is no such thing."""
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


def _has_views(node: fx.Node) -> bool:
    around = [*node.users, *([node] if _is_view(node) else [])]
    return any(_is_view(other) for other in around)


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    name = getattr(getattr(node.target, "_schema", None), "name", "").split("::")[-1] or getattr(
        node.target, "__name__", ""
    )
    return name in _VIEWS
