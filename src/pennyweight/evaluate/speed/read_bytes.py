"""How many bytes of weights are read for one token, found by looking at what a pass over one token reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from pennyweight.inference.experts import PackedExpert
from pennyweight.inference.modules import PackedLinear
from pennyweight.kernels.packed import PackedMatrix
from pennyweight.models.gguf.file import GgufFile, read_gguf

# They read of a tensor only what comes out.
_LOOKS_UP = {nn.functional.embedding, Tensor.__getitem__, torch.index_select, Tensor.index_select}
_EXPERTS = "_exps."
_TABLE, _HEAD = "token_embd.weight", "output.weight"


def bytes_per_token(model: Any) -> int:
    """Bytes of parameters and buffers of a language model that one more token reads: packed weights whole, of tables
    the rows that are looked up, of experts those that are asked. Keys and values of earlier tokens are not counted."""
    counted = _Counted(model)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    hooks = [module.register_forward_pre_hook(counted.begin) for module in packed]
    hooks += [module.register_forward_hook(counted.end) for module in packed]
    try:
        with torch.no_grad(), _one_expert_after_the_other(model), counted:
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counted.read.values())


class _Counted(TorchFunctionMode):
    """`read`: position and length of what was read -> bytes; what is read twice stands once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.read: dict[tuple[int, int], int] = {}
        self._held = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._is_inside = False

    def begin(self, module: nn.Module, given: Any) -> None:
        self._is_inside = True

    def end(self, module: PackedLinear, given: Any, out: Any) -> None:
        self._is_inside = False
        self._add(module.packed.storage)
        if module.bias is not None:
            self._add(module.bias)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = {_storage(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        if self._is_inside or not made:
            return out
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, PackedExpert):
                for part in leaf.parts:
                    self._add(part.storage if isinstance(part, PackedMatrix) else part)
            elif isinstance(leaf, Tensor) and _storage(leaf) in self._held and _storage(leaf) not in made:
                rows = sum(one.numel() for one in made.values()) if func in _LOOKS_UP else leaf.numel()
                self._add(leaf, min(rows, leaf.numel()))
        return out

    def _add(self, tensor: Tensor, count: int | None = None) -> None:
        size = tensor.itemsize * (tensor.numel() if count is None else count)
        self.read[tensor.data_ptr(), size] = size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _one_expert_after_the_other(model: nn.Module) -> Iterator[None]:
    """As long as it lasts, experts are computed one by one, so that what is not asked is not touched."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def gguf_bytes_per_token(first: Path) -> int:
    """The same of a GGUF file, from what it says: a table of tokens that is the head too is read whole."""
    file = read_gguf(first)
    return sum(_bytes_read(file, name) for name in file.tensors)


def _bytes_read(file: GgufFile, name: str) -> int:
    size = file.tensors[name].size_bytes
    if name == _TABLE and _HEAD in file.tensors:
        return size // max(1, file.tensors[name].rows)
    if _EXPERTS not in name:
        return size
    architecture = str(file.fields["general.architecture"].value)
    there, used = (int(file.fields[f"{architecture}.expert_{key}count"].value) for key in ("", "used_"))
    return size * used // there
