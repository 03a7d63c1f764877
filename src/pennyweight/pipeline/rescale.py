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
        matrices = {site.name: self._observed(site, found[site.name]) for site in sites}
        done, _ = rescale_block_(block, folds, self._rescaling, matrices=matrices, stored=stored)
        tensors = kept_names(self._model, index, names)
        changed = sorted({name for one in done for name in one.changed})
        kept = {
            tensors[f"{self._model.blocks[index]}.{name}"]: block.get_parameter(name).detach().to(stored[name])
            for name in changed
        }
        return Rewritten(kept, tuple(_line(one) for one in done))

    def _observed(self, site: Site, found: SiteStatistics) -> Observed:
        parameter = self._model.places[site.name].parameter.removeprefix(f"{self._model.blocks[site.block]}.")
        matrix = self._model.matrix(site)
        return Observed(parameter, matrix, self._schemes[site.name], found.stats, found.magnitude)


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
