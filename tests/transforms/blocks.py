"""Blocks of tiny models of every family, and how to run one alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pennyweight.core.parallel import one_thread_per_operation
from pennyweight.models.skeleton import call_arguments, find_blocks
from tests.models.families import FAMILIES, build, token_batches


class InDouble(TorchFunctionMode):
    """What a model would compute in float32 whatever its type (norms, routers, softmax), it computes in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in kwargs.items()}
        return func(*args, **kwargs)


@dataclass
class Alone:
    """A block, the arguments that its model passes to it, and a random hidden state."""

    block: nn.Module
    hidden: Tensor
    arguments: dict[str, Any]
    is_exact: bool = True

    def run(self, module: nn.Module) -> Tensor:
        with torch.no_grad(), one_thread_per_operation(), InDouble() if self.is_exact else nullcontext():
            out = module(self.hidden, **self.arguments)
        found = out[0] if isinstance(out, tuple) else out
        assert isinstance(found, Tensor)
        return found


def block_of(family: str, index: int = 0) -> Alone:
    """Block `index` of the family's tiny model in float64."""
    known = FAMILIES[family]
    model = build(known.architecture, known.config)
    model.config._experts_implementation = "eager"  # type: ignore[union-attr]
    model = model.double()
    block = model.get_submodule(find_blocks(model)[index])
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(args=args, kwargs=kwargs)

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad(), one_thread_per_operation():
        model(**call_arguments(model, token_batches((2,), 12)[0]))
    hook.remove()
    hidden = torch.randn(2, 12, seen["args"][0].shape[-1], dtype=torch.float64)
    names = list(type(block).forward.__code__.co_varnames[2 : 1 + len(seen["args"])])
    given = {**dict(zip(names, seen["args"][1:], strict=True)), **seen["kwargs"]}
    # A cache would grow with every run.
    caches = ("cache", "past_key_values")
    return Alone(block, hidden, {name: value for name, value in given.items() if name not in caches})
