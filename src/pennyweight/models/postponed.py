"""Imports that happen when what they bring is first used.

transformers imports, for features that nothing here touches (tensor parallelism, paged attention, detection losses),
torch.distributed.tensor, torch._dynamo, sympy and scipy: more than a second, half of all that it takes to import it.
And it reads the source of all its models twice, each time for a list of their names, where one list is enough.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any, Union

UNUSED = (
    "scipy.optimize",
    "torch._dynamo",
    "torch.distributed._composable.fsdp",
    "torch.distributed._functional_collectives",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.distributed.expert_parallel",
    "transformers.distributed.tensor_parallel",
    "transformers.integrations.eager_paged",
    "transformers.integrations.flex_attention",
    "transformers.integrations.sdpa_paged",
)

# Packages whose own code does nothing but list what lies in them.
LISTS = ("transformers.models",)

_COMPILER = "torch._dynamo"


@contextmanager
def postponed(names: Sequence[str] = UNUSED, *, lists: Sequence[str] = LISTS) -> Iterator[None]:
    """Modules `names`, and those below them, that are imported inside are stand-ins: what is taken from them is the
    real thing from its first use on. Those that have been imported before stay what they are; after the block an
    import gives the real module. The first use inside the block ends the postponement for the rest of it.

    Packages `lists` that are imported inside do not run before they are asked for a name that is no module which was
    imported from them; that may be long after the block.
    """
    finder = _Finder(tuple(name for name in names if name not in sys.modules), lists)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        finder.end()


class _Later:
    """Stands for `name` of the module `module`, which is imported when this is called, asked or subclassed.

    Tests need no import: of a class that has not been made there are no instances and no subclasses.
    """

    def __init__(self, finder: _Finder, module: str, name: str) -> None:
        self._later = (finder, module, name)

    def _real(self) -> Any:
        finder, module, name = self._later
        finder.end()
        return getattr(importlib.import_module(module), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._later[1] == _COMPILER and args and isinstance(args[0], FunctionType):
            return self._decorated(*args, **kwargs)
        return self._real()(*args, **kwargs)

    def _decorated(self, function: FunctionType, *args: Any, **kwargs: Any) -> Any:
        """`function` behind a decorator of the compiler, which makes a difference where something is compiled only."""
        import torch

        @functools.wraps(function)
        def run(*a: Any, **k: Any) -> Any:
            is_compiled = torch.compiler.is_compiling()
            return (self._real()(function, *args, **kwargs) if is_compiled else function)(*a, **k)

        return run

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 (`|` would come back here)

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007

    def __instancecheck__(self, instance: object) -> bool:
        return self._is_made() and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._is_made() and issubclass(subclass, self._real())

    def _is_made(self) -> bool:
        module = sys.modules.get(self._later[1])
        return module is not None and not isinstance(module, _StandIn)


class _StandIn(ModuleType):
    """A module whose every name is a _Later."""

    def __init__(self, spec: ModuleSpec, finder: _Finder) -> None:
        super().__init__(spec.name)
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(self._finder, self.__name__, name)


_running = threading.RLock()


class _List(ModuleType):
    """A package that has not run, from which modules are imported as if it had. Its code runs in it, once; what it puts
    in its own place has the modules too that were imported before."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        real = self._real()
        if real is not self:
            return getattr(real, name)
        if name not in vars(self):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return vars(self)[name]

    def __dir__(self) -> Iterable[str]:
        real = self._real()
        return vars(self) if real is self else dir(real)

    def _real(self) -> ModuleType:
        with _running:
            if "_has_run" not in vars(self):
                self._has_run = True
                importlib.reload(self)
            real = sys.modules.get(self.__name__, self)
            if real is not self:
                for name, value in list(vars(self).items()):
                    if isinstance(value, ModuleType):
                        vars(real).setdefault(name, value)
            return real


class _Finder(MetaPathFinder, Loader):
    """Makes stand-ins until it is told to `end`; then none of them can be found any more. The packages `lists` stay as
    they are then."""

    def __init__(self, names: tuple[str, ...], lists: Sequence[str]) -> None:
        self._names = names
        self._lists = set(lists)
        self._made: dict[str, ModuleType] = {}
        self._loaders: dict[str, Any] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._names):
            return ModuleSpec(fullname, self, is_package=True)
        if fullname not in self._lists:
            return None
        self._lists.remove(fullname)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None:
            self._loaders[fullname] = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if spec.has_location:
            return _List(spec.name)
        self._made[spec.name] = _StandIn(spec, self)
        return self._made[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to execute. A list keeps the loader that it would have had."""
        spec = module.__spec__
        if spec is not None and spec.name in self._loaders:
            spec.loader = module.__loader__ = self._loaders.pop(spec.name)

    def end(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        while self._made:
            name, module = self._made.popitem()
            sys.modules.pop(name, None)
            parent, _, child = name.rpartition(".")
            if vars(sys.modules.get(parent, module)).get(child) is module:
                delattr(sys.modules[parent], child)
