"""Linear maps that are called with the same input, computed in one product."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.core.errors import first_line
from pennyweight.inference.modules import PackedLinear
from pennyweight.kernels.packed import multiply
from pennyweight.models.skeleton import call_arguments, find_blocks

# Tokens of the pass that shows which maps share an input.
_TOKENS = 4


class SharedInput:
    """The first of `members` that is called with a tensor computes all of them; the others find their output there.

    An output is handed out once, and only for the very tensor that it was made from, unchanged since: in any order,
    with other inputs in between, or alone, each member gives what it would give by itself. What nobody asks for goes
    with the input.
    """

    def __init__(self, members: Sequence[PackedLinear]) -> None:
        self._members = tuple(members)
        self._kept: _Kept | None = None
        for index, member in enumerate(members):
            member.share(self, index)

    def output(self, x: Tensor, index: int) -> Tensor:
        """Of the member `index` for the input `x`."""
        if x.is_inference():
            # Whether such a tensor was changed in between cannot be seen.
            return self._members[index].alone(x)
        kept = self._kept
        found = kept.take(x, index) if kept is not None else None
        return self._computed(x, index) if found is None else found

    def _computed(self, x: Tensor, index: int) -> Tensor:
        kind = self._members[index].activations
        together = {place: member for place, member in enumerate(self._members) if member.activations == kind}
        matrices = [member.packed.matrix for member in together.values()]
        biases = [member.bias for member in together.values()]
        outputs = dict(zip(together, multiply(x, matrices, biases=biases, activations=kind), strict=True))
        out = outputs.pop(index)
        self._kept = _Kept(x, outputs)
        return out


class _Kept:
    """Outputs by the place of their member, and what they were made from."""

    def __init__(self, x: Tensor, outputs: dict[int, Tensor]) -> None:
        self._outputs = outputs
        self._version = x._version
        # Outputs do not outlive their input.
        self._input = weakref.ref(x, lambda _: outputs.clear())

    def take(self, x: Tensor, index: int) -> Tensor | None:
        """The output of member `index`, once; None where it was made from something else."""
        if self._input() is not x or self._version != x._version:
            return None
        return self._outputs.pop(index, None)


@dataclass(frozen=True)
class Found:
    """Names of linear maps of a model by what they are called with; `why_none` where that could not be seen."""

    groups: list[list[str]]
    why_none: str = ""


def find_shared(model: nn.Module, linears: Collection[str], others: Collection[str]) -> Found:
    """Which of the maps `linears` a block calls with the same tensor, seen by running the model once on a few tokens.

    Nothing is multiplied: these maps, and the modules `others` (embeddings, experts), give zeros. None of their weights
    has to be there.
    """
    calls = _Calls(model)
    stand_ins: dict[str, Callable[..., Any]] = {name: calls.stand_in(name) for name in linears}
    stand_ins |= {name: _zeros(model.get_submodule(name)) for name in others}
    try:
        calls.blocks = find_blocks(model)
        with _replaced(model, stand_ins), torch.no_grad():
            model(**call_arguments(model, torch.zeros(1, _TOKENS, dtype=torch.int64)))
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        return Found([], f"it cannot be run on text alone: {first_line(error)}")
    return Found([names for names in calls.by_input.values() if len(names) > 1])


class _Calls:
    """Notes the names of maps of a block by the input of their first call."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.blocks: list[str] = []
        self.by_input: dict[tuple[int, int, str], list[str]] = {}
        self._inputs: list[Tensor] = []
        self._known: set[str] = set()

    def stand_in(self, name: str) -> Callable[[Tensor], Tensor]:
        module = self._model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        count = module.out_features

        def call(x: Tensor) -> Tensor:
            block = next((block for block in self.blocks if name.startswith(f"{block}.")), None)
            if block is not None and name not in self._known:
                # Kept, so that no other input gets the same id.
                self._inputs.append(x)
                self._known.add(name)
                self.by_input.setdefault((id(x), x._version, block), []).append(name)
            return x.new_zeros(*x.shape[:-1], count)

        return call


def _zeros(module: nn.Module) -> Callable[..., Tensor]:
    """Zeros as an embedding gives them for ids, and experts for the hidden state that comes first."""

    def call(x: Tensor, *_: Any, **__: Any) -> Tensor:
        if isinstance(module, nn.Embedding):
            return torch.zeros(*x.shape, module.embedding_dim, dtype=module.weight.dtype)
        return torch.zeros_like(x)

    return call


@contextmanager
def _replaced(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Modules, by name, call `functions` in place of their own forward."""
    modules = [model.get_submodule(name) for name in functions]
    for module, function in zip(modules, functions.values(), strict=True):
        module.forward = function
    try:
        yield
    finally:
        for module in modules:
            del module.forward
