"""What an importance matrix of llama.cpp says of a model's sites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pennyweight.containers.base import Container, ImportanceEntry
from pennyweight.core.errors import DataError
from pennyweight.models.base import Site
from pennyweight.pipeline.collect import SiteStatistics
from pennyweight.solvers.base import Statistics

if TYPE_CHECKING:
    from pennyweight.models.gguf.imatrix import Importance

_MISSING = "not in the importance matrix: all its inputs count alike"
_UNSEEN = "saw no tokens of the importance matrix: all its inputs count alike"


def known_statistics(
    file: Path, container: Container, sites: Sequence[Site], *, device: torch.device
) -> dict[str, SiteStatistics]:
    """The mean squares of each site's inputs, by site, from the importance matrix `file`, in either of its formats.

    Raises CheckpointError for a damaged file, ShapeError for one of another model's shapes, DataError where it has none
    of `sites`.
    """
    from pennyweight.models.gguf.imatrix import read_imatrix

    entries = read_imatrix(file)
    found: dict[str, SiteStatistics] = {}
    for site in sites:
        place = container.importance_entry(site)
        entry = None if place is None else entries.get(place.name)
        if place is None or entry is None:
            # An embedding looks up rows and multiplies nothing: no matrix has it.
            notes = () if site.kind == "embedding" else (_MISSING,)
            found[site.name] = SiteStatistics(Statistics(), 0, notes)
            continue
        is_seen = len(entry.counts) == 1 or int(entry.counts[place.index]) > 0
        found[site.name] = SiteStatistics(
            Statistics(diagonal=_row(entry, place).to(device) if is_seen else None), 0, () if is_seen else (_UNSEEN,)
        )
    if not any(one.stats.diagonal is not None for one in found.values()):
        raise DataError(
            f"{file}: has none of the {len(sites)} weights of this model, but {next(iter(entries))} and others. "
            "Give the matrix that llama-imatrix made of this very model."
        )
    return found


def _row(entry: Importance, place: ImportanceEntry) -> Tensor:
    """The values of one matrix, float32 [in]; a weight of several that all see every token may have one row."""
    if entry.values.numel() == place.shape[-1]:
        return entry.values.flatten()
    # llama.cpp does not count axes of length 1 at the outside.
    shape = place.shape if len(place.shape) == 3 else place.shape[-2:]
    return entry.for_weight(place.name, shape)[place.index]
