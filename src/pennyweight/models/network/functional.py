"""Operations that write into their argument become those that give a new tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pennyweight.core.errors import ModelError

aten = torch.ops.aten
# In eval mode these give their argument itself, which their traced values do not show.
_IDENTITIES = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_REMEDY = "use the operation without the underscore, or torch.cat or torch.where in place of an assignment to a part"


def writes_into_parts(graph: fx.GraphModule) -> bool:
    """Whether a value is written that is read in another shape afterwards, as after x[:, 0] += 1."""
    return any(_stale(node) for node in graph.graph.nodes if _mutates(node) and not _states(node))


def without_mutation(graph: fx.GraphModule) -> None:
    """Edit `graph`: relu_(x) becomes relu(x), and whoever read x after it reads the result.

    A buffer that is written but that no output depends on (a counter of calls) is no longer written. Raises ModelError
    for a node that writes into part of another value, or into a buffer that an output depends on.
    """
    for node in list(graph.graph.nodes):
        if not _mutates(node):
            continue
        states, plain, after = _states(node), _plain(node.target), _after(node)
        if states and _reaches_output([*states, node]):
            raise ModelError(
                f"{_place(node)} changes {states[0].target}, which the network reads: a graph keeps no state between "
                "calls. Let the state be an input and an output."
            )
        if plain is None or (not states and _stale(node)):
            raise ModelError(f"{_place(node)} writes into a part of a value that is read elsewhere: {_REMEDY}")
        node.target = plain
        for value in _aliases(node):
            for user in list(value.users):
                if user in after and value not in after and value is not node:
                    user.replace_input_with(value, node)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


def put_dropouts_back(graph: fx.GraphModule, net: nn.Module) -> None:
    """Edit `graph`, as run_decompositions left it: the copies that modules for dropout became are dropouts again."""
    for node in graph.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.target is not aten.clone.default or not stack:
            continue
        module = net.get_submodule(str(stack[-1][0]).split("@")[0])
        operation = next((made for kind, made in _DROPOUTS.items() if isinstance(module, kind)), None)
        if operation is not None:
            node.target, node.args, node.kwargs = operation, (node.args[0], module.p, False), {}
    graph.recompile()


_DROPOUTS: dict[type[nn.Module], Any] = {
    nn.Dropout: aten.dropout.default,
    nn.AlphaDropout: aten.alpha_dropout.default,
    nn.FeatureAlphaDropout: aten.feature_alpha_dropout.default,
    **dict.fromkeys((nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), aten.feature_dropout.default),
}


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return bool(schema and schema.is_mutable and isinstance(node.args[0], fx.Node))


def _plain(target: Any) -> Any:
    """aten.relu_.default -> aten.relu.default; None where there is no such thing."""
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None)


def _states(node: fx.Node) -> list[fx.Node]:
    """The parameters and buffers that `node` writes into."""
    return [other for other in _aliases(node) if other.op == "get_attr"]


def _stale(node: fx.Node) -> list[fx.Node]:
    """The values that show what `node` writes in another shape, and are read after it."""
    after, written = _after(node), node.args[0]
    assert isinstance(written, fx.Node)
    others = [other for other in _aliases(node) if other not in after and other is not node]
    return [other for other in others if not _is_same(other, written) and any(user in after for user in other.users)]


def _after(node: fx.Node) -> set[fx.Node]:
    found = set()
    while node.next.op != "root":
        node = node.next
        found.add(node)
    return found


def _aliases(node: fx.Node) -> list[fx.Node]:
    """All values in the memory that `node` writes into."""
    written = node.args[0]
    assert isinstance(written, fx.Node)
    memory = _memory(written)
    return [other for other in node.graph.nodes if other is written or (memory and _memory(other) == memory)]


def _memory(node: fx.Node) -> int | None:
    """Which memory the value of `node` lies in, as the export saw it."""
    while node.target in _IDENTITIES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _is_same(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values in one memory are the same numbers in the same order; sizes may be symbols."""
    a, b = one.meta["val"], other.meta["val"]
    return bool(
        str(a.shape) == str(b.shape)
        and str(a.stride()) == str(b.stride())
        and str(a.storage_offset()) == str(b.storage_offset())
    )


def _reaches_output(nodes: Iterable[fx.Node]) -> bool:
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.users
    return any(node.op == "output" for node in seen)


def _place(node: fx.Node) -> str:
    """The node, and the line of the user's code that it comes from."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if 'File "' in line]
    return ", ".join([f"{node.name} ({node.target})", *lines[-1:]])
