"""Nodes of a network's graph that are other names for the values they read."""

from __future__ import annotations

from torch import fx, nn

SAME = frozenset({"contiguous", "clone", "detach", "alias", "lift_fresh_copy", "dropout", "feature_dropout"})


def name_of(node: fx.Node) -> str:
    """The name of an ATen operation or a function without its overload, "" for anything else."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name.split("::")[-1]) if schema is not None else str(getattr(node.target, "__name__", ""))


def is_identity(node: fx.Node) -> bool:
    """Whether nothing is left of `node` where a network is used, not trained."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None
        return isinstance(owner.get_submodule(str(node.target)), nn.Dropout | nn.Identity)
    return name_of(node) in SAME


def before_identities(node: fx.Node) -> fx.Node:
    """The value that `node` is another name for."""
    while is_identity(node) and isinstance(source := node.args[0], fx.Node):
        node = source
    return node


def value_read(node: fx.Node) -> str:
    """The name of the value that `node` multiplies, its first argument; "" where that is none of the graph's."""
    source = node.args[0]
    return before_identities(source).name if isinstance(source, fx.Node) else ""
