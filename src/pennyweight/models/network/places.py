"""Where in a graph the module goes that an operation becomes: under the path that it had in the user's module."""

from __future__ import annotations

from torch import Tensor, fx, nn


class Places:
    """The modules that were put into `graph`, the graph of `net`, by their paths."""

    def __init__(self, graph: fx.GraphModule, net: nn.Module) -> None:
        self._graph, self._net = graph, net
        self._taken: dict[str, nn.Module] = {}

    def put(self, made: nn.Module, node: fx.Node, weight: fx.Node | None) -> str:
        """Put `made`, which does what `node` does with the parameter that `weight` reads, into the graph; its path.

        A module that is called again, with the same tensors and settings, is there once.
        """
        wanted = next((path for path in _paths(node, weight) if self._was(path, made, weight)), None)
        path = self._fresh_path(node, weight) if wanted is None else wanted
        while path in self._taken and not _is_same(self._taken[path], made):
            path = f"{path}_{node.name}"
        if path not in self._taken:
            if wanted is not None:
                _take_over(self._net.get_submodule(wanted), made)
                _keep_rest(self._graph, path, made)
            self._taken[path] = made
            _insert(self._graph, path, made)
        return path

    def _was(self, path: str, made: nn.Module, weight: fx.Node | None) -> bool:
        """Whether the user's module had at `path` one of the kind of `made` with the same weight."""
        if not path:
            return False
        try:
            there = self._net.get_submodule(path)
        except AttributeError:
            return False
        kind = nn.modules.batchnorm._BatchNorm if isinstance(made, nn.modules.batchnorm._BatchNorm) else type(made)
        if not isinstance(there, kind):
            return False
        if weight is None:
            return True
        own = self._tensor(f"{path}.{_last(weight)}")
        return own is not None and own is self._tensor(str(weight.target))

    def _tensor(self, target: str) -> Tensor | None:
        parent, _, name = target.rpartition(".")
        try:
            found = getattr(self._net.get_submodule(parent), name)
        except AttributeError:
            return None
        return found if isinstance(found, Tensor) else None

    def _fresh_path(self, node: fx.Node, weight: fx.Node | None) -> str:
        """Named by the parameter, attention.in_proj for attention.in_proj_weight, or by the operation."""
        operation = str(node.target).split(".")[1]
        if weight is None:
            inner = _paths(node, None)
            path = f"{inner[0]}.{operation}" if inner and inner[0] else operation
        else:
            parent, _, name = str(weight.target).rpartition(".")
            short = name.removesuffix("_weight") if name.endswith("_weight") else f"{name}_{operation}"
            short = operation if name.startswith("weight") else short
            path = f"{parent}.{short}" if parent else short
        while path not in self._taken and _exists(self._graph, path):
            path += "_"
        return path


def _paths(node: fx.Node, weight: fx.Node | None) -> list[str]:
    """Where the module may have been: the innermost that was running, and the owner of the weight."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # Of a module's second call the export says "path@1".
    running = [str(stack[-1][0]).split("@")[0]] if stack else []
    return running + ([str(weight.target).rpartition(".")[0]] if weight is not None else [])


def _last(weight: fx.Node) -> str:
    return str(weight.target).rpartition(".")[2]


def _exists(graph: fx.GraphModule, path: str) -> bool:
    found: object = graph
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is not None


def _is_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether both compute the same with the same tensors; a batch norm counts its batches besides."""
    mine, theirs = _tensors(one), _tensors(other)
    return str(one) == str(other) and all(mine.get(name) is tensor for name, tensor in theirs.items())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in named if name != "num_batches_tracked"}


def _take_over(old: nn.Module, made: nn.Module) -> None:
    """What an operation in eval mode does not show."""
    if isinstance(made, nn.modules.batchnorm._BatchNorm) and isinstance(old, nn.modules.batchnorm._BatchNorm):
        made.momentum = old.momentum


def _keep_rest(graph: fx.GraphModule, path: str, made: nn.Module) -> None:
    """Give `made` what else there is at `path`: counters of batches, parameters of a subclass."""
    try:
        old = graph.get_submodule(path)
    except AttributeError:
        return
    for kind in ("_parameters", "_buffers", "_modules"):
        mine, theirs = getattr(made, kind), getattr(old, kind)
        for name, value in theirs.items():
            if name not in mine or name == "num_batches_tracked":
                mine[name] = value
    made._non_persistent_buffers_set |= old._non_persistent_buffers_set


def _insert(graph: fx.GraphModule, path: str, module: nn.Module) -> None:
    parent: nn.Module = graph
    *above, last = path.split(".")
    for part in above:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        child = parent._modules[part]
        assert child is not None
        parent = child
    parent._modules[last] = module
