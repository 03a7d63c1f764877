"""The folds of a streamed model's blocks."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pennyweight.models.streamed import StreamedModel
from pennyweight.transforms.base import Fold
from pennyweight.transforms.structure import find_folds

Kind = tuple[tuple[str, tuple[int, ...]], ...]

# Tokens of the input on which folds are proved.
_TOKENS = 16
# The first ids of a vocabulary are seldom text, but never images.
_FIRST_ID = 5


class FoldFinder:
    """Finds folds on random hidden states; blocks with the same parameters have the same folds, found once."""

    def __init__(self, model: StreamedModel, *, seed: int = 0) -> None:
        self._model = model
        self._stream = model.start([small_ids(model)])
        [hidden] = self._stream.hidden
        self.hidden = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)).to(hidden)
        self._known: dict[Kind, list[Fold]] = {}

    def find(self, block: nn.Module, index: int) -> list[Fold]:
        """The folds of the opened block `index`."""
        kind = kind_of(block)
        if kind not in self._known:
            self._known[kind] = find_folds(block, lambda probed: self.run(probed, index, self.hidden))
        return self._known[kind]

    def run(self, module: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """What `module` gives in place of block `index` for a hidden state of the shape of `self.hidden`."""
        self._stream.hidden = [hidden]
        return self._model.run_block(module, index, self._stream)[0]


def kind_of(block: nn.Module) -> Kind:
    """The same for blocks whose parameters have the same names and shapes."""
    return tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def small_ids(model: StreamedModel) -> Tensor:
    """One window of a few token ids that every vocabulary has."""
    return (_FIRST_ID + torch.arange(_TOKENS)).remainder(model.config.get_text_config().vocab_size)[None]


def kept_types(model: StreamedModel, index: int, quantized: Collection[str]) -> dict[str, torch.dtype]:
    """Stored type of each parameter of block `index` that holds none of the `quantized` sites, by name in the block."""
    prefix = f"{model.blocks[index]}."
    held = {model.places[name].parameter for name in quantized}
    found: dict[str, torch.dtype] = {}
    for name in model.weights.sources:
        if name.startswith(prefix) and name not in held:
            key = model.weights.sources[name].keys[0]
            found[name.removeprefix(prefix)] = model.checkpoint.tensors[key].dtype
    return found


def can_be_written(model: StreamedModel, index: int, fold: Fold, quantized: Collection[str]) -> bool:
    """Every kept parameter of the fold is one tensor of the checkpoint, as it is: what is changed can be written."""
    kept = kept_types(model, index, quantized)
    names = [part.parameter for part in fold.producer] + [reader.parameter for reader in fold.readers]
    sources = [model.weights.sources[f"{model.blocks[index]}.{name}"] for name in names if name in kept]
    return all(source.converter is None for source in sources)
