"""Rewriting each block before it is solved, so that it loses less when its weights are rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pennyweight.models.base import Site
from pennyweight.models.folds import FoldFinder, can_be_written, kept_types
from pennyweight.models.streamed import StreamedModel
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.schemes import Scheme
from pennyweight.transforms.base import Rescaling
from pennyweight.transforms.rescale import Observed, Rescaled, rescale_block_


@dataclass(frozen=True)
class Rewritten:
    """What else changed where the folds of a block were rescaled.

    kept         checkpoint name -> new value, in its stored type, of parameters that are no sites
    folds        one line for each fold that was rescaled, for the record
    """

    kept: Mapping[str, Tensor]
    folds: tuple[str, ...]


class BlockRescaler:
    """Finds the folds of the blocks of `model` and rescales them as `rescaling` says."""

    def __init__(self, model: StreamedModel, rescaling: Rescaling, schemes: Mapping[str, Scheme]) -> None:
        self._model = model
        self._rescaling = rescaling
        self._schemes = schemes
        self._finder = FoldFinder(model)

    def rewrite_(self, block: nn.Module, sites: Sequence[Site], found: Mapping[str, SiteStatistics]) -> Rewritten:
        """Rescale the folds of the opened block of `sites`, which are those that will be quantized."""
        index = sites[0].block
        names = [site.name for site in sites]
        folds = [fold for fold in self._finder.find(block, index) if can_be_written(self._model, index, fold, names)]
        stored = kept_types(self._model, index, names)
        matrices = {name: self._observed(name, index, found[name]) for name in names}
        done, _ = rescale_block_(block, folds, self._rescaling, matrices=matrices, stored=stored)
        prefix = f"{self._model.blocks[index]}."
        changed = sorted({name for one in done for name in one.changed})
        kept = {
            self._model.weights.sources[prefix + name].keys[0]: block.get_parameter(name).detach().to(stored[name])
            for name in changed
        }
        return Rewritten(kept, tuple(_line(one) for one in done))

    def _observed(self, name: str, index: int, found: SiteStatistics) -> Observed:
        place = self._model.places[name]
        parameter = place.parameter.removeprefix(f"{self._model.blocks[index]}.")
        matrix = place.view(self._model.module.get_parameter(place.parameter).data)
        return Observed(parameter, matrix, self._schemes[name], found.stats, found.magnitude)


def kept_names(model: StreamedModel, index: int, quantized: Sequence[str]) -> dict[str, str]:
    """Parameters of block `index` that hold no quantized site and are one tensor as it is -> that tensor's name."""
    prefix = f"{model.blocks[index]}."
    names = (prefix + name for name in kept_types(model, index, quantized))
    sources = {name: model.weights.sources[name] for name in names}
    return {name: source.keys[0] for name, source in sources.items() if source.converter is None}


def _line(one: Rescaled) -> str:
    made = ", ".join(part.parameter for part in one.fold.producer)
    read = ", ".join(reader.parameter for reader in one.fold.readers)
    return f"{made} -> {read}: scales {float(one.s.min()):.3g} to {float(one.s.max()):.3g}"
